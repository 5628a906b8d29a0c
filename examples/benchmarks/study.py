"""Do learned indicators choose better widths than equal widths do?

    python examples/benchmarks/study.py --task resnet20 --level W3A3 --seeds 3
    python examples/benchmarks/study.py --report

Every row starts from the same float weights and gets the same steps and schedule. What each test item gave is kept
in the cache folder ($HUB_MPQ_CACHE), so that a stopped study goes on where it was and the report can bootstrap over
items. Methods: float (the start itself, once a level); uniform; mixed (learned indicators); untrained (the same ILP on
the initial scales); random (another policy for each seed, BitOps or bytes within 1 % of the budget); reversed (score
tables exchanged between layers of opposite rank).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from images import cache_root
from policies import random_policy, reversed_scores
from tasks import TASKS, Task

from hub_mpq import HubMPQ, Policy
from hub_mpq.core import Budget
from hub_mpq.pack import read_indicators, write_indicators
from hub_mpq.search.movement import movement
from hub_mpq.search.policy_search import search_policy

METHODS = ("float", "uniform", "mixed", "untrained", "random", "reversed")


def indicators_of(mpq: HubMPQ, task: Task, learned: bool, seed: int, folder: Path, options: dict[str, Any]) -> None:
    """Give `mpq` the indicators of a task and seed, trained once for all levels and methods."""
    file = folder / f"{task.name}-{'learned' if learned else 'untrained'}-{seed}.safetensors"
    if not file.exists():
        asked = {k: v for k, v in options.items() if k != "alpha"}
        settings = {**task.indicator_options, **(asked if learned else {"steps": 0})}
        began = time.perf_counter()
        found = mpq.train_indicators(
            task.train(seed), candidates=task.candidates, seed=seed, **{"steps": task.indicator_steps, **settings}
        )
        provenance = {**found.provenance, "seconds": time.perf_counter() - began}
        write_indicators(file, replace(found, provenance=provenance))
    mpq.scores = read_indicators(file)


def policy_of(
    mpq: HubMPQ, task: Task, method: str, level: str, seed: int, folder: Path, options: dict[str, Any]
) -> tuple[Policy, float, Any]:
    """(policy, seconds to find it, what the indicators' training says of itself)."""
    budget = task.budget(level)
    if method == "uniform":
        return Policy.uniform(mpq.graph, task.uniform(level)), 0.0, None
    indicators_of(mpq, task, method in ("mixed", "reversed"), seed, folder, options)
    provenance = mpq.scores.provenance
    began = time.perf_counter()
    if method == "random":
        reference = mpq.search(**budget)
        limit = next(iter(budget))
        return random_policy(mpq, limit, reference.usage[limit], np.random.default_rng(seed)), 0.0, None
    if method == "reversed":
        scores, _ = mpq.score_table()
        result = search_policy(
            mpq.graph, reversed_scores(scores), Budget(**budget), base_bytes=mpq.base_bytes(), strategy="reversed"
        )
    else:
        result = mpq.search(**budget, alpha=options.get("alpha") if method == "mixed" else None)
    return result.policy, provenance["seconds"] + time.perf_counter() - began, provenance["movement"]


def run(task: Task, method: str, level: str, seed: int, folder: Path, options: dict[str, Any]) -> None:
    file = folder / f"{task.name}-{level}-{method}-{seed}.json"
    if file.exists() or (method == "float" and seed):
        return
    mpq = task.build()
    usage: dict[str, float] = {}
    bits: dict[str, str] = {}
    seconds, movement = 0.0, None
    if method != "float":
        policy, seconds, movement = policy_of(mpq, task, method, level, seed, folder, options)
        train = task.train(seed)
        mpq.apply_policy(policy, train, reestimate_norms=False)
        mpq.finetune(train, steps=task.tune_steps, seed=seed, **task.tune_options)
        usage = {k: float(v) for k, v in mpq.usage().amounts.items()}
        bits = {k: str(v) for k, v in policy.bits.items()}
    items, score = task.measure(mpq)
    row = {
        "task": task.name,
        "level": level,
        "method": method,
        "seed": seed,
        "score": score,
        "usage": usage,
        "search_seconds": seconds,
        "movement": movement,
        "items": items,
        "policy": bits,
    }
    file.with_suffix(".part").write_text(json.dumps(row))
    file.with_suffix(".part").rename(file)
    print(f"{task.name} {level} {method} seed {seed}: {score:.2f}", flush=True)


def bootstrap(measure: Callable[[Any], float], a: list[Any], b: list[Any], rounds: int = 2000) -> str:
    """95 % interval of measure(a) − measure(b) over resampled test items, seeds together."""
    generator = np.random.default_rng(0)
    first, second = np.array(a, dtype=float), np.array(b, dtype=float)
    draws = []
    for _ in range(rounds):
        chosen = generator.integers(first.shape[1], size=first.shape[1])
        draws.append(np.mean([measure(x[chosen]) - measure(y[chosen]) for x, y in zip(first, second, strict=True)]))
    return "{:+.2f} … {:+.2f}".format(*np.percentile(draws, [2.5, 97.5]))


def report(folder: Path) -> None:
    rows = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    for name, level in sorted({(r["task"], r["level"]) for r in rows}):
        task = TASKS[name]
        here = [r for r in rows if (r["task"], r["level"]) == (name, level)]
        mixed = {r["seed"]: r for r in here if r["method"] == "mixed"}
        measures = [task.score, *([task.distance] if task.distance else [])]
        lines = []
        for method in METHODS:
            found = [r for r in here if r["method"] == method]
            if not found:
                continue
            pairs = [(mixed[r["seed"]]["items"], r["items"]) for r in found if r["seed"] in mixed]
            line = [method, str(len(found))]
            for measure in measures:
                scores = [measure(np.array(r["items"], dtype=float)) for r in found]
                line += [f"{np.mean(scores):.2f}", f"{np.std(scores):.2f}", ""]
                if method != "mixed" and pairs:
                    line[-1] = bootstrap(measure, [p[0] for p in pairs], [p[1] for p in pairs])
            if method == "float":
                lines.append([*line, "", "", ""])
                continue
            lines.append(
                [
                    *line,
                    f"{np.mean([r['usage']['bitops'] for r in found]) / 1e9:.4f}",
                    f"{np.mean([r['usage']['size'] for r in found]):.0f}",
                    f"{np.mean([r['search_seconds'] for r in found]):.1f}",
                ]
            )
        print(f"\n### {name} at {level}\n")
        head = ["method", "seeds", task.unit, "spread", "mixed minus this, 95 %"]
        head += ["distance to float", "spread", "mixed minus this, 95 %"] if task.distance else []
        head += ["G BitOps", "bytes", "search s"]
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
        print("\n" + "\n".join(movements(folder, name)))


def movements(folder: Path, task: str) -> list[str]:
    """What the joint training changed: the scales against their start, the indicators against untrained ones."""
    changes: dict[str, list[dict[str, float]]] = {}
    for file in sorted(folder.glob(f"{task}-learned-*.safetensors")):
        learned = read_indicators(file)
        for side, moved in learned.provenance["movement"].items():
            changes.setdefault(f"{side} scales", []).append(moved)
        start = file.with_name(file.name.replace("-learned-", "-untrained-"))
        if start.exists():
            untrained = read_indicators(start)
            for side in ("weight", "activation"):
                changes.setdefault(f"{side} indicators", []).append(
                    movement(getattr(untrained, side), getattr(learned, side))
                )
    return [
        f"{what}: median change {100 * np.mean([m['median_change'] for m in found]):.1f} %, "
        f"rank correlation with the start {np.mean([m['rank_correlation'] for m in found]):.3f}"
        for what, found in changes.items()
        if all(found)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), action="append")
    parser.add_argument("--level", action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--options", default="{}", help="JSON: settings of train_indicators, and alpha, for ablations")
    parser.add_argument("--name", default="study", help="folder of the rows, in the cache")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    folder = cache_root() / args.name
    folder.mkdir(exist_ok=True)
    if args.report:
        report(folder)
        return
    for seed in range(args.seeds):
        for name in args.task or sorted(TASKS):
            for level in args.level or TASKS[name].levels:
                for method in args.method or METHODS:
                    run(TASKS[name], method, level, seed, folder, json.loads(args.options))


if __name__ == "__main__":
    main()
