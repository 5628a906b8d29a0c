"""The table a user wants to read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .core import LayerGraph, Policy, SearchResult, Usage, human, human_seconds, limits
from .cost.bitops import float_bitops, layer_bitops
from .cost.size import layer_nbytes
from .errors import shown

NOT_RUN_SHARE = 0.05
"""Weights that may stay unreached without a word."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text table: first column to the left, the others to the right. Cells are cut and escaped, as `shown` does."""
    rows = [[shown(cell, 120) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])


def report(
    graph: LayerGraph,
    policy: Policy | None,
    usage: Usage | None,
    metrics: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    expected: Mapping[str, tuple[float, float | None]] | None = None,
    unit: str = "",
) -> str:
    """Per layer and in all; layers left float and products of activations at the end.

    Args:
        graph: The layers.
        policy: Their widths; None before a search.
        usage: Costs of the policy.
        metrics: {"float" | "quantized": figures}.
        seconds: {stage: wall time}.
        expected: {searched layer: (estimated divergence that its widths cause, its relative standard error)}.
        unit: What that is counted in.
    """
    rows = []
    for layer in graph:
        bits = policy.bits[layer.name] if policy else layer.fixed
        rows.append(
            [
                layer.name,
                layer.kind,
                ("fixed " if layer.fixed else "") + (str(bits) if bits else "searched"),
                human(layer.macs),
                human(layer.weight_count),
                human(layer_bitops(layer, bits)) if bits else "",
                human(layer_nbytes(layer, bits)) if bits else "",
            ]
        )
    for op in graph.floats:
        rows.append([op.name, op.kind, "float", human(op.macs), human(op.weight_count), human(float_bitops(op)), ""])
    lines = [f"{shown(graph.model_id)} ({shown(graph.library)}), input {'×'.join(map(str, graph.input_shape))}"]
    head = ["layer", "kind", "bits", "MACs", "weights", "BitOps", "bytes"]
    if expected:
        head.append(unit)
        rows = [[*row, estimate(*expected[row[0]]) if row[0] in expected else ""] for row in rows]
    lines.append(table(head, rows))
    if expected:
        whole = sum(value for value, _ in expected.values())
        lines.append(f"expected {unit} of the policy before fine-tuning: {whole:.4g}")
    if usage is not None:
        lines += [f"{limit.label}: {limit.show(usage[limit.name])}" for limit in limits if limit.name in usage.amounts]
    for op in graph.floats:
        lines.append(f"float: {shown(op.name, 120)} ({shown(op.reason)})")
    if missed := not_run_line(graph):
        lines.append(f"warning: {shown(missed)}")
    for which, figures in metrics.items():
        lines.append(f"{shown(which, 120)}: " + figures_line(figures, ", "))
    if seconds:
        lines.append("seconds: " + ", ".join(f"{k} {v:.3g}" for k, v in seconds.items()))
    return "\n".join(lines)


def not_run_line(graph: LayerGraph) -> str:
    """A sentence where more than 5 % of the weights never ran in the traced forward, else ""."""
    share, modules = graph.not_run()
    if share <= NOT_RUN_SHARE:
        return ""
    named = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    return (
        f"{share:.0%} of the weights never ran on the example input, so they stay float and their work is not counted: "
        f"{named}"
    )


def warn_of_not_run(graph: LayerGraph) -> None:
    """Give `not_run_line` as a warning, if there is one."""
    if missed := not_run_line(graph):
        warnings.warn(missed, stacklevel=3)


def estimate(value: float, error: float | None) -> str:
    """A value with its relative standard error."""
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.0%}"


def figures_line(figures: Mapping[str, Any], between: str = "  ") -> str:
    """Measured figures in one line; the task's name is text, the others numbers."""
    texts = {shown(k, 120): shown(v, 120) if isinstance(v, str) else f"{v:.4g}" for k, v in figures.items()}
    return between.join(f"{k} {v}" for k, v in texts.items())


def measurements(result: SearchResult) -> str:
    """How a search's policy was chosen: the table of what was measured, the verdict, the check of the prediction; ""
    for a policy that nobody asked to measure."""
    lines = []
    if result.measurements:
        rows = [
            [
                m.name + (" *" if m.policy == result.policy else ""),
                "" if m.predicted is None else f"{m.predicted:.4g}",
                f"{m.divergence:.4g} ± {m.standard_error:.2g}" if math.isfinite(m.divergence) else "not finite",
                f"{m.difference:+.3g} ± {m.difference_error:.2g}"
                if m.name != "optimum" and math.isfinite(m.difference) and math.isfinite(m.difference_error)
                else "",
            ]
            for m in result.measurements
        ]
        lines.append(table(["policy (* returned)", "predicted", "divergence", "less the optimum's"], rows))
    if result.validation is not None:
        lines.append(str(result.validation))
    if result.check is not None:
        lines.append(str(result.check))
    return "\n".join(lines)


def latency_line(facts: Mapping[str, Any]) -> str:
    """What was measured of a policy that was searched for under a latency."""
    measured, spread, limit, predicted = (
        human_seconds(facts[key]) for key in ("measured", "spread", "limit", "predicted")
    )
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return (
        f"latency: {measured} ± {spread} measured on {shown(facts['runtime'])} (batch {facts['batch_size']}, "
        f"{threads}, {shown(facts['machine'])}); limit {limit}, predicted {predicted}"
    )
