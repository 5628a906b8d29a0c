"""What a command prints: one JSON object, or human-readable text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from ..core import limits
from ..report import measurements, table


def emit(as_json: bool, tree: Mapping[str, Any], text: str) -> None:
    """Print one or the other to stdout."""
    typer.echo(json.dumps(tree, indent=2, sort_keys=False) if as_json else text)


def saved(path: Path) -> None:
    """Print to stderr that a plot was written."""
    typer.echo(f"saved {path}", err=True)


def policy_table(result: Any, graph: Any) -> str:
    """Layers with their bit-widths, then the cost of the policy, the proof of the optimum and measurements."""
    rows = [
        [layer.name, layer.kind, str(result.policy.bits[layer.name]), "pinned" if layer.fixed else ""]
        for layer in graph
    ]
    lines = [table(["layer", "kind", "bits", ""], rows), str(result.usage), result.proof, measurements(result)]
    return "\n".join(filter(None, lines))


def front_table(results: Sequence[Any]) -> str:
    """One row per point."""
    names = [limit.name for limit in limits if limit.over == "sum" and not limit.at_least]
    names = [name for name in names if all(name in result.usage.amounts for result in results)]
    rows = [
        [*(limits.get(name).show(r.usage[name]) for name in names), f"{r.objective:.6g}", f"{r.seconds:.3f}"]
        for r in results
    ]
    return table([*names, "objective", "seconds"], rows)
