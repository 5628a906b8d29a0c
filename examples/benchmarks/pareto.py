"""Pictures of the study: accuracy over BitOps and over bytes, a file per network, from the rows of study.py.

python examples/benchmarks/pareto.py --name study --to examples/benchmarks/pictures
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from images import cache_root
from tasks import TASKS

COLOURS = {"uniform": "#444444", "mixed": "#c0392b", "untrained": "#2e86c1", "random": "#999999", "reversed": "#b7950b"}


def draw(task: str, rows: list[dict[str, Any]], path: Path) -> None:
    """One picture: a point per method and level (mean over seeds, bars from the least to the greatest)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, cost, unit, by in zip(panels, ("bitops", "size"), ("G BitOps", "kB"), (1e9, 1e3), strict=True):
        for method, colour in COLOURS.items():
            points = []
            for level in sorted({r["level"] for r in rows}):
                found = [r for r in rows if (r["method"], r["level"]) == (method, level)]
                if found:
                    scores = [r["score"] for r in found]
                    where = np.mean([r["usage"][cost] for r in found]) / by
                    points.append((where, np.mean(scores), min(scores), max(scores)))
            if not points:
                continue
            x, y, low, high = np.array(sorted(points)).T
            line = "-" if method in ("uniform", "mixed") else "none"
            panel.errorbar(x, y, (y - low, high - y), marker="o", ms=4, ls=line, c=colour, capsize=2, label=method)
        for score in {r["score"] for r in rows if r["method"] == "float"}:
            panel.axhline(score, ls=":", c="#444444", label="float")
        panel.set_xlabel(unit)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(TASKS[task].unit)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(task)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="study", help="folder of the rows, in the cache")
    parser.add_argument("--to", type=Path, default=Path("pictures"))
    args = parser.parse_args()
    rows = [json.loads(p.read_text()) for p in sorted((cache_root() / args.name).glob("*.json"))]
    args.to.mkdir(parents=True, exist_ok=True)
    for task in sorted({r["task"] for r in rows}):
        draw(task, [r for r in rows if r["task"] == task], args.to / f"pareto-{task}.png")
        print(args.to / f"pareto-{task}.png")


if __name__ == "__main__":
    main()
