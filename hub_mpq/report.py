"""Human-readable reports of a model, its policy and how the policy was chosen."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .core import LayerBits, LayerGraph, Limit, Policy, SearchResult, Usage, human, human_seconds, limits
from .core.limit import fixed_of
from .cost.bitops import float_bitops, layer_bitops
from .cost.size import layer_nbytes
from .errors import InvalidArgument, shown

_DIVERGENCES = {"kl": ("KL", "KL divergence"), "target_error": ("target error", "divergence (target error)")}
"""{unit of scores: (title of their column, the quantity)}."""
_PLAIN_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?")
NOT_RUN_SHARE = 0.05
"""Share of the weights that may go unused by the example input without a warning."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a plain-text table.

    The first column is left-aligned, the others are right-aligned. Cells are cut to 120 characters, and control
    characters are escaped.

    Args:
        head: Column titles.
        rows: Cells of each row, as many as there are titles.

    Returns:
        The table, one line for each row, without a trailing newline.

    Example:
        >>> from hub_mpq.report import table
        >>> print(table(["layer", "bits"], [["conv1", "W8A8"], ["fc", "W4A4"]]))
        layer  bits
        -----  ----
        conv1  W8A8
        fc     W4A4
    """
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
    budget: Mapping[str, str] | None = None,
) -> str:
    """Format the report of a model: bits and costs of each layer, totals, metrics and times.

    Layers that stay float, and products of activations, come last. `HubMPQ.report` calls this function.

    Args:
        graph: The layers of the model.
        policy: Bit-widths of the layers; None before a search.
        usage: Total costs of the policy; None to omit them.
        metrics: `{"float" | "quantized": metrics}`, as measured by `HubMPQ.evaluate`.
        seconds: `{stage: wall time in seconds}`.
        expected: `{searched layer: (estimated divergence caused by its bit-widths, relative standard error or None)}`;
            None to omit the column.
        unit: Unit of `expected`, which names its column: "kl" or "target_error".
        budget: `{limit: what the budget allows}`, from `allowances`, to show next to the totals; None to omit it.

    Returns:
        The report as text.

    Example:
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.report import report
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False)
        >>> policy = Policy.uniform(mpq.graph, "W4A4")
        >>> text = report(mpq.graph, policy, mpq.usage(policy), {"quantized": {"top1": 87.5}}, {"search": 0.25})
        >>> print("\\n".join(text.splitlines()[-2:]))
        quantized: top1 87.5
        seconds: search 0.25
    """
    rows = []
    for layer in graph:
        bits = policy.bits[layer.name] if policy else layer.fixed
        rows.append(
            [
                layer.name,
                layer.kind,
                ("pinned " if layer.fixed else "") + (str(bits) if bits else "searched"),
                human(layer.macs),
                human(layer.weight_count),
                human(layer_bitops(layer, bits)) if bits else "",
                human(layer_nbytes(layer, bits)) if bits else "",
            ]
        )
    for op in graph.floats:
        rows.append([op.name, op.kind, "float", human(op.macs), human(op.weight_count), human(float_bitops(op)), ""])
    title = f"{shown(graph.model_id)} ({shown(graph.library)}), input {'×'.join(map(str, graph.input_shape))}"
    head = ["layer", "kind", "bits", "MACs", "weights", "BitOps", "bytes"]
    totals = []
    if expected:
        column, divergence = _DIVERGENCES.get(unit, (unit, unit))
        head.append(column)
        rows = [[*row, estimate(*expected[row[0]]) if row[0] in expected else ""] for row in rows]
        whole = sum(value for value, _ in expected.values())
        totals.append(f"expected {divergence} from the float model, without fine-tuning: {whole:.4g}")
    if usage is not None:
        totals += _totals(policy, usage, budget or {})
    floats = [f"stays float: {shown(op.name, 120)} ({shown(op.reason)})" for op in graph.floats]
    if missed := not_run_line(graph):
        floats.append(f"warning: {shown(missed)}")
    measured = [f"{shown(which, 120)}: " + figures_line(figures, ", ") for which, figures in metrics.items()]
    if policy is not None and "float" in metrics and "quantized" not in metrics:
        measured.append("quantized: not measured")
    if len({figures["samples"] for figures in metrics.values() if "samples" in figures}) > 1:
        measured.append("note: these were measured on different data")
    if seconds:
        measured.append("seconds: " + ", ".join(f"{k} {v:.3g}" for k, v in seconds.items()))
    return "\n\n".join("\n".join(part) for part in ([title, table(head, rows)], totals, floats, measured) if part)


def _totals(policy: Policy | None, usage: Usage, budget: Mapping[str, str]) -> list[str]:
    """One line for each amount, with what the budget allows; amounts of inputs only if some input is quantized."""
    lines = []
    for limit in limits:
        of_inputs = limit.level_parts == ("activation",)
        if limit.name in usage.amounts and not (of_inputs and policy is not None and policy.weights_alone):
            allowed = f" (budget {budget[limit.name]})" if limit.name in budget else ""
            lines.append(f"{limit.label}: {limit.show(usage[limit.name])}{allowed}")
    return lines


def allowances(
    budget: str, graph: LayerGraph, policy: Policy, usage: Usage, *, level_amounts: bool = True
) -> dict[str, str]:
    """Describe what a budget allows for the whole model.

    Args:
        budget: The budget as text, as in `SearchResult.details["budget"]`. What cannot be read in it is omitted.
        graph: The layers of the model.
        policy: The policy found within the budget.
        usage: Total costs of the policy.
        level_amounts: Whether to convert levels such as "W4A4" to amounts.

    Returns:
        `{limit: text}`.

    Example:
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.report import allowances
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False)
        >>> policy = Policy.uniform(mpq.graph, "W3A3")
        >>> allowances("bitops W4A4, size 5.7MB", mpq.graph, policy, mpq.usage(policy))
        {'bitops': 'W4A4: 1.778 G', 'size': '5.700 MB'}
    """
    out = {}
    for part in budget.split(", "):
        name, _, text = part.partition(" ")
        if name not in limits:
            continue
        limit = limits.get(name)
        try:
            value = limit.parse(float(text) if _PLAIN_NUMBER.fullmatch(text) else text)
        except InvalidArgument:
            continue
        if not isinstance(value, LayerBits):
            out[name] = f"at least {limit.show(value)}" if limit.at_least else limit.show(value)
            continue
        amount = _of_level(limit, value, graph, policy, usage) if level_amounts else None
        out[name] = text if amount is None else f"{text}: {limit.show(amount)}"
    return out


def _of_level(limit: Limit, level: LayerBits, graph: LayerGraph, policy: Policy, usage: Usage) -> float | None:
    """The amount of the whole model at a level: that of the policy, with other searched layers."""
    cap = limit.cap(graph, level, 0)
    if limit.over == "max":
        return limit.whole(graph, cap, 0)
    if limit.name not in usage.amounts:
        return None
    return usage[limit.name] + cap - limit.together([(x, policy.bits[x.name]) for x in graph.searched], fixed_of(graph))


def not_run_line(graph: LayerGraph) -> str:
    """Describe the weights that the example input did not use.

    Args:
        graph: The layers of the model, as traced with its example input.

    Returns:
        One sentence if more than 5 % of the weights did not run, else "".

    Example:
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.report import not_run_line
        >>> not_run_line(HubMPQ.from_pretrained("test_resnet", pretrained=False).graph)
        ''
    """
    share, modules = graph.not_run()
    if share <= NOT_RUN_SHARE:
        return ""
    named = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    return (
        f"{share:.0%} of the weights were not used by the example input; they stay float and their cost is not "
        f"counted: {named}"
    )


def warn_of_not_run(graph: LayerGraph) -> None:
    """Warn if more than 5 % of the weights were not used by the example input.

    Args:
        graph: The layers of the model, as traced with its example input.

    Example:
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.report import warn_of_not_run
        >>> warn_of_not_run(HubMPQ.from_pretrained("test_resnet", pretrained=False).graph)
    """
    if missed := not_run_line(graph):
        warnings.warn(missed, stacklevel=3)


def estimate(value: float, error: float | None) -> str:
    """Format a value with its relative standard error.

    Args:
        value: The value.
        error: Its relative standard error, a fraction of the value; None if unknown.

    Returns:
        The value with three significant digits, and the error in percent if known.

    Example:
        >>> from hub_mpq.report import estimate
        >>> estimate(0.01234, 0.08)
        '0.0123 ± 8%'
    """
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.0%}"


def figures_line(figures: Mapping[str, Any], between: str = "  ") -> str:
    """Format measured metrics on one line.

    Args:
        figures: Metrics as returned by `HubMPQ.evaluate`: numbers, and strings such as the name of the task.
        between: Separator of the metrics.

    Returns:
        The metrics in order, numbers with four significant digits.

    Example:
        >>> from hub_mpq.report import figures_line
        >>> figures_line({"task": "classification", "top1": 91.234, "samples": 512.0})
        'task classification  top1 91.23  samples 512'
    """
    texts = {shown(k, 120): shown(v, 120) if isinstance(v, str) else f"{v:.4g}" for k, v in figures.items()}
    return between.join(f"{k} {v}" for k, v in texts.items())


def measurements(result: SearchResult) -> str:
    """Explain how the policy of a search was chosen.

    Args:
        result: What `HubMPQ.search` returned.

    Returns:
        The table of the measured policies, the verdict, and how well the scores predict measurements; "" if no
        measurement was requested.

    Example:
        >>> from hub_mpq import Policy, SearchResult
        >>> from hub_mpq.core import Usage, Validation
        >>> from hub_mpq.report import measurements
        >>> print(measurements(SearchResult(
        ...     Policy({}, ""), Usage({}), "optimal", 0.0, 0.0, 0.0, 0.0, "limpq",
        ...     validation=Validation(False, "only 4 samples are held out"),
        ... )))
        not validated: only 4 samples are held out
    """
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
        lines.append(table(["policy (* returned)", "predicted", "divergence", "vs. optimum"], rows))
    if result.validation is not None:
        lines.append(str(result.validation))
    if result.check is not None:
        lines.append(str(result.check))
    return "\n".join(lines)


def latency_line(facts: Mapping[str, Any]) -> str:
    """Format the measured latency of a policy that was searched for under a latency limit.

    Args:
        facts: `measured`, `spread`, `limit` and `predicted` in seconds, and the `runtime`, `batch_size`, `threads` and
            `machine` of the measurement, as in `HubMPQ.history["latency"]`.

    Returns:
        One line.

    Example:
        >>> from hub_mpq.report import latency_line
        >>> facts = {"measured": 0.0048, "spread": 0.0001, "limit": 0.005, "predicted": 0.0047}
        >>> facts |= {"runtime": "onednn", "batch_size": 1, "threads": 2, "machine": "2 cores, AVX2"}
        >>> print(latency_line(facts))  # doctest: +NORMALIZE_WHITESPACE
        latency: 4.8 ms ± 100 us measured on onednn (batch 1, 2 threads, 2 cores, AVX2);
        limit 5 ms, predicted 4.7 ms
    """
    measured, spread, limit, predicted = (
        human_seconds(facts[key]) for key in ("measured", "spread", "limit", "predicted")
    )
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return (
        f"latency: {measured} ± {spread} measured on {shown(facts['runtime'])} (batch {facts['batch_size']}, "
        f"{threads}, {shown(facts['machine'])}); limit {limit}, predicted {predicted}"
    )
