"""Do mixed bit-widths beat equal ones, and do trained indicators choose better ones than untrained indicators?

    python examples/benchmarks/study.py --task resnet20 --level W2A2 --seeds 3
    python examples/benchmarks/study.py --report
    python examples/benchmarks/study.py --summary

Every row starts from the same float weights and gets the same steps and schedule. The result of each test item is kept
in the cache folder ($HUB_MPQ_CACHE), so a stopped study can be continued and the report can bootstrap over items. It
runs on the GPU if available. Methods: float (the start itself, once per level); uniform; mixed (trained indicators);
measured (mixed, then validated on held-out batches); untrained (the same integer program on the initial scales); scale
(the paper's own indicator, after the same joint training); random (another policy for each seed, BitOps or bytes within
1 % of the budget); reversed (score tables exchanged between layers of opposite rank).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import cache_root
from policies import random_policy, reversed_scores
from tasks import LEVELS, SENTENCES, TASKS, Task

from hub_mpq import HubMPQ, Policy
from hub_mpq.core import Budget
from hub_mpq.pack import read_indicators, write_indicators
from hub_mpq.search.movement import movement
from hub_mpq.search.policy_search import search_policy

METHODS = ("float", "uniform", "mixed", "measured", "untrained", "scale", "random", "reversed")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "untrained": ("untrained", {"steps": 0}),
    "random": ("untrained", {"steps": 0}),
    "scale": ("scale", {"indicator": "scale"}),
}
"""{method: (name of its indicators, their settings)}; the other methods use the trained ones."""


def commit() -> str:
    """Return the commit: $HUB_MPQ_COMMIT, or that of git."""
    given = os.environ.get("HUB_MPQ_COMMIT")
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return given or subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def device_name() -> str:
    """Return the name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def write(file: Path, row: dict[str, Any]) -> None:
    """Write a finished row atomically, with its device and commit."""
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({**row, "device": device_name(), "commit": commit()}))
    part.rename(file)


def resumable(file: Path) -> dict[str, Any]:
    """Return options of the training behind `file` that make it resume from its newest state."""
    return {"checkpoint_dir": file.with_suffix(".states"), "resume": True}


def indicator_file(task: Task, method: str, level: str, seed: int, folder: Path) -> Path:
    """Return the file of the indicators of a method: one for all levels of one set of candidates."""
    kind = KINDS.get(method, ("learned", {}))[0]
    return folder / f"{task.name}-{kind}-{task.levels[level].name.replace(' ', '-')}-{seed}.safetensors"


def indicators_of(
    mpq: HubMPQ, task: Task, method: str, level: str, seed: int, folder: Path, options: dict[str, Any]
) -> None:
    """Give `mpq` the indicators of a method, and train them if they are missing."""
    kind, changes = KINDS.get(method, ("learned", {}))
    file = indicator_file(task, method, level, seed, folder)
    if not file.exists():
        asked = {k: v for k, v in options.items() if k != "alpha"} if kind == "learned" else {}
        settings = {"steps": task.indicator_steps, **task.indicator_options, **asked, **changes, **resumable(file)}
        began = time.perf_counter()
        scores = mpq.train_scores(task.train(seed), candidates=task.levels[level].widths, seed=seed, **settings)
        provenance = {**scores.provenance, "seconds": time.perf_counter() - began}
        part = file.with_suffix(f".{os.getpid()}.part")
        write_indicators(part, replace(scores, provenance=provenance))
        part.rename(file)
        shutil.rmtree(file.with_suffix(".states"), ignore_errors=True)
    mpq.scores = read_indicators(file)


def policy_of(
    mpq: HubMPQ, task: Task, method: str, level: str, seed: int, folder: Path, options: dict[str, Any]
) -> tuple[Policy, float, dict[str, Any]]:
    """Return (policy, seconds to find it, facts about the search)."""
    budget = task.budget(level)
    if method == "uniform":
        return Policy.uniform(mpq.graph, task.levels[level].uniform), 0.0, {}
    indicators_of(mpq, task, method, level, seed, folder, options)
    provenance = mpq.scores.provenance
    told = {"movement": provenance["movement"]}
    began = time.perf_counter()
    if method == "random":
        reference = mpq.search(**budget)
        limit = next(iter(budget))
        return random_policy(mpq, limit, reference.usage[limit], np.random.default_rng(seed)), 0.0, told
    if method == "reversed":
        scores, _ = mpq.score_table()
        result = search_policy(
            mpq.graph, reversed_scores(scores), Budget(**budget), base_bytes=mpq.base_bytes(), strategy="reversed"
        )
    elif method == "measured":
        result = mpq.search(**budget, validate=task.held())
        told["chosen_by"] = result.chosen_by
    else:
        result = mpq.search(**budget, alpha=options.get("alpha") if method == "mixed" else None)
    return result.policy, provenance["seconds"] + time.perf_counter() - began, told


def run(
    task: Task,
    method: str,
    level: str,
    seed: int,
    folder: Path,
    options: dict[str, Any],
    tune: dict[str, Any] | None = None,
    indicators: Path | None = None,
) -> None:
    """Run a row unless it is finished.

    options: settings of train_indicators, and alpha. tune: settings of the fine-tuning that replace those of the task.
    indicators: folder of the indicators; None for that of the row.
    """
    file = folder / f"{task.name}-{level.replace(' ', '-')}-{method}-{seed}.json"
    if file.exists() or (method == "float" and seed):
        return
    began = time.perf_counter()
    mpq = task.build()
    usage: dict[str, float] = {}
    bits: dict[str, str] = {}
    seconds, told = 0.0, {}
    if method != "float":
        policy, seconds, told = policy_of(mpq, task, method, level, seed, indicators or folder, options)
        train = task.train(seed)
        mpq.apply_policy(policy, train, reestimate_norms=False)
        settings = {"steps": task.tune_steps, **task.tune_options, **(tune or {}), **resumable(file)}
        mpq.finetune(train, seed=seed, **settings)
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
        "seconds": time.perf_counter() - began,
        **told,
        "items": items,
        "policy": bits,
    }
    write(file, row)
    shutil.rmtree(file.with_suffix(".states"), ignore_errors=True)
    print(f"{task.name} {level} {method} seed {seed}: {score:.2f} in {row['seconds']:.1f} s", flush=True)


def bootstrap(measure: Callable[[Any], float], a: list[Any], b: list[Any], rounds: int = 2000) -> str:
    """Return the 95 % interval of measure(a) − measure(b) over resampled test items, with all seeds together."""
    generator = np.random.default_rng(0)
    first, second = np.array(a, dtype=float), np.array(b, dtype=float)
    draws = []
    for _ in range(rounds):
        chosen = generator.integers(first.shape[1], size=first.shape[1])
        draws.append(np.mean([measure(x[chosen]) - measure(y[chosen]) for x, y in zip(first, second, strict=True)]))
    return "{:+.2f} … {:+.2f}".format(*np.percentile(draws, [2.5, 97.5]))


def report(folder: Path) -> None:
    """Print the tables of the finished rows in Markdown."""
    rows = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    for name, level in sorted({(r["task"], r["level"]) for r in rows}):
        task = TASKS[name]
        here = {
            m: {r["seed"]: r for r in rows if (r["task"], r["level"], r["method"]) == (name, level, m)} for m in METHODS
        }
        measures = [(task.unit, task.score), *([("distance to float", task.distance)] if task.distance else [])]
        head, lines = ["method", "seeds"], []
        for unit, _ in measures:
            head += [unit, "spread", "minus uniform, 95 %", "minus mixed, 95 %"]
        head += ["G BitOps", "bytes", "search s"]
        for method, found in here.items():
            if not found:
                continue
            line = [method, str(len(found))]
            for _, measure in measures:
                scores = [measure(np.array(r["items"], dtype=float)) for r in found.values()]
                line += [f"{np.mean(scores):.2f}", f"{np.std(scores):.2f}"]
                for other in ("uniform", "mixed"):
                    both = [s for s in found if s in here[other] and method != other]
                    ours, theirs = ([of[s]["items"] for s in both] for of in (found, here[other]))
                    line.append(bootstrap(measure, ours, theirs) if both else "")
            if method != "float":
                means = [np.mean([r["usage"][cost] for r in found.values()]) for cost in ("bitops", "size")]
                line += [f"{means[0] / 1e9:.4f}", f"{means[1]:.0f}"]
                line.append(f"{np.mean([r['search_seconds'] for r in found.values()]):.1f}")
            lines.append([*line, *[""] * (len(head) - len(line))])
        print(f"\n### {name} at {level}\n")
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
        known = {r["device"] for found in here.values() for r in found.values()}
        print("\nOn " + ", ".join(sorted(known)) + "; " + "; ".join(movements(folder, task, level)))


def summary(folder: Path) -> None:
    """Print one Markdown table per network: the score of each method, and its 95 % interval minus uniform."""
    rows = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    methods = [method for method in METHODS if method not in ("float", "uniform")]
    for name in sorted({r["task"] for r in rows}):
        task = TASKS[name]
        own = [r for r in rows if r["task"] == name]
        measures = [(task.unit, task.score), *([("distance to float", task.distance)] if task.distance else [])]
        whole = next((r["items"] for r in own if r["method"] == "float"), None)
        for unit, measure in measures:
            told = "" if whole is None else f", float {measure(np.array(whole, dtype=float)):.2f}"
            print(f"\n### {name}: {unit}{told}\n")
            head = ["level", "seeds", "uniform", *methods, "mixed minus untrained, 95 %"]
            print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
            for level in (level for level in task.levels if any(r["level"] == level for r in own)):
                here = {
                    m: {r["seed"]: r["items"] for r in own if (r["level"], r["method"]) == (level, m)} for m in METHODS
                }
                seeds = sorted({len(found) for m, found in here.items() if found and m != "float"})
                cells = [level, "–".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "0"]
                for method in ("uniform", *methods):
                    found = here[method]
                    scores = [measure(np.array(items, dtype=float)) for items in found.values()]
                    both = [s for s in found if s in here["uniform"] and method != "uniform"]
                    interval = (
                        bootstrap(measure, [found[s] for s in both], [here["uniform"][s] for s in both]) if both else ""
                    )
                    cells.append((f"{np.mean(scores):.2f}" if scores else "") + (f" ({interval})" if interval else ""))
                both = [s for s in here["mixed"] if s in here["untrained"]]
                trained, start = ([here[m][s] for s in both] for m in ("mixed", "untrained"))
                print("| " + " | ".join([*cells, bootstrap(measure, trained, start) if both else ""]) + " |")
        known = {f"{r['device']} at {r['commit']}" for r in own}
        print("\nOn " + ", ".join(sorted(known)))


def movements(folder: Path, task: Task, level: str) -> list[str]:
    """Describe what the joint training changed: scales against their start, indicators against untrained ones."""
    changes: dict[str, list[dict[str, float]]] = {}
    for seed in range(10):
        file, start = (indicator_file(task, method, level, seed, folder) for method in ("mixed", "untrained"))
        if not file.exists():
            continue
        learned = read_indicators(file)
        for side, moved in learned.provenance["movement"].items():
            changes.setdefault(f"{side} scales", []).append(moved)
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
    parser.add_argument("--level", action="append", help=", ".join(dict.fromkeys([*LEVELS, *SENTENCES])))
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--options", default="{}", help="JSON: settings of train_indicators, and alpha")
    parser.add_argument("--name", default="study", help="folder of the rows in the cache")
    parser.add_argument("--report", action="store_true", help="print a table for each network and level, and exit")
    parser.add_argument("--summary", action="store_true", help="print a table for each network, and exit")
    args = parser.parse_args()
    folder = cache_root() / args.name
    folder.mkdir(parents=True, exist_ok=True)
    if args.report or args.summary:
        (report if args.report else summary)(folder)
        return
    for seed in range(args.seeds):
        for name in args.task or sorted(TASKS):
            for level in args.level or TASKS[name].levels:
                for method in args.method or METHODS:
                    run(TASKS[name], method, level, seed, folder, json.loads(args.options))


if __name__ == "__main__":
    main()
