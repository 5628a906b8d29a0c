"""Plots of the study: accuracy over BitOps and over bytes, one file per network, from the rows of study.py, with the
policies of other packages from the rows of strategies.py.

    python examples/benchmarks/pareto.py --name study --to examples/benchmarks/pictures
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from images import cache_root
from tasks import TASKS

COLOURS = {
    "uniform": "#444444",
    "mixed": "#c0392b",
    "measured": "#e67e22",
    "untrained": "#2e86c1",
    "scale": "#8e44ad",
    "random": "#999999",
    "reversed": "#b7950b",
}
PEERS = {"ModelOpt": "s", "AutoScheme": "D", "MCT": "^"}
"""{word in the name of a row of strategies.py: marker} of policies of other packages, fine-tuned by hub_mpq."""
LINES = ("uniform", "mixed")
LEVEL = re.compile(r"W\d+A\d+")


def draw(task: str, rows: list[dict[str, Any]], peers: list[dict[str, Any]], path: Path) -> None:
    """Draw one plot: a point per method and level (mean over seeds, bars from minimum to maximum).

    The plot over BitOps has the levels of BitOps, that over bytes all of them. Lines join equal bits of both operands.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, cost, unit, by in zip(panels, ("bitops", "size"), ("G BitOps", "kB"), (1e9, 1e3), strict=True):
        levels = sorted({r["level"] for r in rows if cost == "size" or LEVEL.fullmatch(r["level"])})
        for method, colour in COLOURS.items():
            points = [p for level in levels if (p := point(rows, method, level, cost, by)) is not None]
            if not points:
                continue
            x, y, low, high, joined = np.array(sorted(points)).T
            panel.errorbar(x, y, (y - low, high - y), marker="o", ms=4, ls="none", c=colour, capsize=2, label=method)
            if method in LINES:
                panel.plot(x[joined > 0], y[joined > 0], c=colour, lw=1)
        for name, marker in PEERS.items():
            found = [(r["bytes" if cost == "size" else cost] / by, r["top1"]) for r in peers if name in r["row"]]
            if found:
                panel.plot(*zip(*found, strict=True), marker, ms=5, c="#16a085", label=name)
        for score in {r["score"] for r in rows if r["method"] == "float"}:
            panel.axhline(score, ls=":", c="#444444", label="float")
        panel.set_xlabel(unit)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(TASKS[task].unit)
    handles = dict(reversed(pair) for panel in panels for pair in zip(*panel.get_legend_handles_labels(), strict=True))
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(task)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def point(rows: list[dict[str, Any]], method: str, level: str, cost: str, by: float) -> tuple[float, ...] | None:
    """Return (mean cost, mean score, minimum, maximum, whether both operands have equal bits) over seeds."""
    found = [r for r in rows if (r["method"], r["level"]) == (method, level)]
    if not found:
        return None
    scores = [r["score"] for r in found]
    widths = re.findall(r"\d+", level)
    equal = len(widths) == 2 and widths[1] in (widths[0], "8")  # inputs of a sentence encoder always have 8 bits
    where = float(np.mean([r["usage"][cost] for r in found])) / by
    return where, float(np.mean(scores)), min(scores), max(scores), float(equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="study", help="folder of the rows in the cache")
    parser.add_argument("--to", type=Path, default=Path("pictures"), help="output folder")
    args = parser.parse_args()
    rows = [json.loads(p.read_text()) for p in sorted((cache_root() / args.name).glob("*.json"))]
    file = cache_root() / "strategies.jsonl"
    peers = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    args.to.mkdir(parents=True, exist_ok=True)
    for task in sorted({r["task"] for r in rows}):
        draw(
            task,
            [r for r in rows if r["task"] == task],
            peers if task == "resnet20" else [],
            args.to / f"pareto-{task}.png",
        )
        print(args.to / f"pareto-{task}.png")


if __name__ == "__main__":
    main()
