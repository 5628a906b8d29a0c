"""Ablations: the study's mixed row with one setting changed.

    python examples/benchmarks/ablations.py --task resnet20 --level W3A3
    python examples/benchmarks/ablations.py --tuning --task resnet20 --level W2A2
    python examples/benchmarks/ablations.py --report

By default the training of the indicators varies; with --tuning the fine-tuning does, for 60 steps and for five epochs.
Start, steps, schedule and test items are those of the study, and each row differs from the default in one setting.
Finished rows are kept in the cache folder ($HUB_MPQ_CACHE), so a stopped run can be continued.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from images import cache_root
from study import bootstrap, indicator_file, run
from tasks import TASKS, Task

from hub_mpq.pack import read_indicators
from hub_mpq.search.movement import movement

# settings of train_indicators; alpha is a setting of the search, which uses the indicators of the default
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "untrained": {"steps": 0},
    "a quarter of the steps": {"steps": 10},
    "four times the steps": {"steps": 160},
    "frozen weights": {"freeze_weights": True},
    "the authors' SGD": {"preset": "authors", "indicator": "loss"},
    "per-tensor scales": {"granularity": "tensor"},
    "random pass alone": {"uniform": False},
    "α = 0.5": {"alpha": 0.5},
    "α = 2": {"alpha": 2.0},
    "relative power as indicator": {"indicator": "scale"},
    "raw scale as indicator": {"indicator": "raw scale"},
    "raw scale, the authors' SGD": {"preset": "authors"},
    # one epoch of a share of MNIST, which determines the number of joint steps
    "10 % of the data": {"share": 0.1, "steps": None},
    "50 % of the data": {"share": 0.5, "steps": None},
    "100 % of the data": {"share": 1.0, "steps": None},
}
TUNINGS: dict[str, dict[str, Any]] = {
    "tuning default": {},
    "BatchNorm as trained": {"reestimate_norms": False},
    "half distilled": {"distill": 0.5},
    "distilled": {"distill": 1.0},
    "EMA 0.99": {"ema": 0.99},
    "EMA 0.999": {"ema": 0.999},
    "distilled, EMA 0.99": {"distill": 1.0, "ema": 0.99},
}
LENGTHS: dict[str, dict[str, Any]] = {"60 steps": {"steps": 60}, "five epochs": {"steps": None, "epochs": 5}}
"""Lengths of fine-tuning; each of `TUNINGS` is run for both."""
SHARES = [name for name in VARIANTS if name.endswith("the data")]


def variants_of(task: str) -> list[str]:
    """Return the variants of a task; shares only of MNIST, as an epoch of CIFAR-10 is 20 times the study."""
    return [name for name in VARIANTS if task == "mnist" or name not in SHARES]


def folder_of(variant: str) -> Path:
    folder = cache_root() / "ablations" / variant.replace(" ", "-").replace("%", "percent")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_variant(task: str, level: str, variant: str, seed: int) -> None:
    """Run a row with one setting of the indicators' training changed."""
    # α is a setting of the search, which uses the indicators of the default
    first = folder_of("default") if variant.startswith("α") else None
    print(f"{variant}: ", end="", flush=True)
    run(TASKS[task], "mixed", level, seed, folder_of(variant), VARIANTS[variant], indicators=first)


def run_tuning(task: str, level: str, variant: str, length: str, seed: int) -> None:
    """Run a row with one setting of the fine-tuning changed, at the policy of the default."""
    folder, tune = folder_of(f"{variant}, {length}"), {**LENGTHS[length], **TUNINGS[variant]}
    print(f"{variant}, {length}: ", end="", flush=True)
    run(TASKS[task], "mixed", level, seed, folder, {}, tune, indicators=folder_of("default"))


def report() -> None:
    """Print the tables of the finished rows in Markdown."""
    tables(VARIANTS, "default")
    for length in LENGTHS:
        tables([f"{variant}, {length}" for variant in TUNINGS], f"tuning default, {length}")


def tables(variants: Iterable[str], first: str) -> None:
    """Print a table for each task and level that compares every variant with `first`."""
    rows: dict[tuple[str, str], dict[str, dict[int, Any]]] = {}
    for variant in variants:
        for file in sorted(folder_of(variant).glob("*.json")):
            row = json.loads(file.read_text())
            rows.setdefault((row["task"], row["level"]), {}).setdefault(variant, {})[row["seed"]] = row
    for (name, level), found in sorted(rows.items()):
        task, default = TASKS[name], found.get(first, {})
        head = ["setting", task.unit, "spread", "seeds", f"minus {first}, 95 %", "rank corr. W / A", "search s"]
        print(f"\n### {name} at {level}\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for variant, seeds in found.items():
            both = sorted(set(seeds) & set(default))
            ours, theirs = ([of[s]["items"] for s in both] for of in (seeds, default))
            scores = [row["score"] for row in seeds.values()]
            cells = [
                variant,
                f"{np.mean(scores):.2f}",
                f"{np.std(scores):.2f}",
                str(len(scores)),
                "" if variant == first or not both else bootstrap(task.score, ours, theirs),
                " / ".join(f"{x:.2f}" for x in correlations(variant, task, level, sorted(seeds))),
                f"{np.mean([row['search_seconds'] for row in seeds.values()]):.0f}",
            ]
            print("| " + " | ".join(cells) + " |")


def correlations(variant: str, task: Task, level: str, seeds: list[int]) -> list[float]:
    """Return the mean rank correlation of the weight and activation indicators with untrained ones of the same kind.

    Empty where there are none: a scale and a divergence have different units.
    """
    out: list[list[float]] = []
    for seed in seeds:
        start, end = (indicator_file(task, "mixed", level, seed, folder_of(v)) for v in ("untrained", variant))
        if start.exists() and end.exists() and not variant.startswith(("relative power", "raw scale")):
            first, last = read_indicators(start), read_indicators(end)
            out.append(
                [movement(getattr(first, s), getattr(last, s))["rank_correlation"] for s in ("weight", "activation")]
            )
    return [float(x) for x in np.mean(out, axis=0)] if out else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), action="append")
    parser.add_argument("--level", action="append")
    parser.add_argument("--variant", choices=sorted({*VARIANTS, *TUNINGS}), action="append")
    parser.add_argument(
        "--tuning", action="store_true", help="vary the fine-tuning instead of the training of the indicators"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    for seed in () if args.report else range(args.seeds):
        for task in args.task or ("resnet20", "mnist"):
            for level in args.level or ("W4A4", "W3A3"):
                if args.tuning:
                    for variant in args.variant or TUNINGS:
                        for length in LENGTHS:
                            run_tuning(task, level, variant, length, seed)
                else:
                    for variant in args.variant or variants_of(task):
                        run_variant(task, level, variant, seed)
    report()


if __name__ == "__main__":
    main()
