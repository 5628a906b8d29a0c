"""From indicators to one score per layer and pair of bit-widths (LIMPQ §3.4, and any other strategy)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import pairwise

from ..core import FLOAT_BITS, Candidates, Indicators, LayerBits, LayerGraph, Policy
from ..errors import InvalidArgument
from .candidates import check_one_grid

Scores = Mapping[str, Mapping[LayerBits, float]]


def available(scales: Mapping[int, float]) -> list[int]:
    """Return the usable bit-widths of a layer after joint training, in ascending order.

    A scale below that of the next wider bit-width is an outlier of the training, and its bit-width is dropped. The
    narrowest one is never dropped, so that no budget becomes infeasible.
    """
    widths = sorted(scales)
    kept = {b for b, wider in pairwise(widths) if scales[b] >= scales[wider]}
    return [b for b in widths if b in kept or b in (widths[0], widths[-1])]


def balance(indicators: Indicators) -> float:
    """Return Σ activation indicators / Σ weight indicators, which gives both equal weight; this is our construction."""
    weight = sum(s for row in indicators.weight.values() for s in row.values())
    activation = sum(s for row in indicators.activation.values() for s in row.values())
    return activation / weight if weight and activation else 1.0


def default_alpha(indicators: Indicators) -> float:
    """Return the default α: 1 if weights and activations have the same unit (divergences, relative powers).

    Otherwise it is `balance`.
    """
    return 1.0 if indicators.predicts or indicators.unit in ("loss", "relative_power") else balance(indicators)


def scored_candidates(indicators: Indicators, graph: LayerGraph, *, weight_only: bool = False) -> dict[str, Candidates]:
    """Return `{searched layer: all bit-widths that it has indicators for}`."""
    return {
        x.name: Candidates(
            tuple(indicators.weight.get(x.name, (2,))),
            (FLOAT_BITS,) if weight_only else tuple(indicators.activation.get(x.name, (FLOAT_BITS,))),
        )
        for x in graph.searched
    }


def equal_scores(graph: LayerGraph, candidates: Mapping[str, Candidates]) -> Scores:
    """Return a score of 0 for all candidates, for a search that only tests whether a budget is feasible."""
    return {
        x.name: dict.fromkeys(candidates[x.name].weights if x.weight_only else candidates[x.name].pairs, 0.0)
        for x in graph.searched
    }


def score_table(
    indicators: Indicators,
    graph: LayerGraph,
    candidates: Mapping[str, Candidates] | None = None,
    alpha: float | None = None,
    *,
    weight_only: bool = False,
) -> tuple[Scores, float]:
    """Build the scores that the solver adds up.

    Args:
        indicators: Scores of any strategy; their `sense` tells whether smaller or larger ones are better.
        graph: The layers of the model.
        candidates: `{searched layer: candidates}`; None for all that have a score.
        alpha: Multiplier for LIMPQ's weight indicators; None for `default_alpha`.
        weight_only: Whether inputs stay float.

    Returns:
        (`{searched layer: {bit-widths: score}}`, α).

    Raises:
        InvalidArgument: A layer has no score at its candidates, or alpha was given for another strategy than LIMPQ.
    """
    there = [*indicators.weight, *indicators.pairs]
    if missing := [layer.name for layer in graph.searched if layer.name not in there]:
        raise InvalidArgument(
            f"layer {missing[0]!r} has no score{_of_other_layers(there, graph)}; score the layers of this model again, "
            f"or pin the layer with fixed= (--pin) if it was pinned when the others were scored"
        )
    if not indicators.pairs:
        chosen = candidates or scored_candidates(indicators, graph, weight_only=weight_only)
        used = default_alpha(indicators) if alpha is None else alpha
        return limpq_scores(indicators, graph, chosen, used), used
    if alpha is not None:
        raise InvalidArgument(f"alpha only applies to LIMPQ's indicators, got scores of {indicators.strategy!r}")
    table = {}
    for layer in graph.searched:
        row = dict(indicators.pairs.get(layer.name, {}))
        if candidates is not None:
            wanted = candidates[layer.name]
            row = _in_groups(layer.name, row, wanted)
            choices = {*wanted.pairs, *wanted.weights}
            row = {bits: score for bits, score in row.items() if bits in choices}
        if weight_only:
            row = {bits: score for bits, score in row.items() if bits.activation == FLOAT_BITS}
        if not row:
            raise InvalidArgument(f"layer {layer.name!r} has no score at these candidates; score the layers with them")
        table[layer.name] = row
    return table, 0.0


def _of_other_layers(scored: Collection[str], graph: LayerGraph) -> str:
    """Say that scores are of another model, if they name a layer that this model does not have."""
    known = {*graph.names, *(op.name for op in graph.floats)}
    strange = next((name for name in scored if name not in known), None)
    return "" if strange is None else f": the scores are of another model, with a layer {strange!r}"


def _in_groups(name: str, row: Mapping[LayerBits, float], wanted: Candidates) -> dict[LayerBits, float]:
    """Apply the group size of the candidates to scores of bit-widths alone; scores of groups are unchanged.

    Raises:
        InvalidArgument: There are several group sizes, which scores of bit-widths alone cannot tell apart.
    """
    if any(bits.grouped for bits in row):
        return dict(row)
    check_one_grid({name: wanted})
    return {grouped[0]: score for bits, score in row.items() if (grouped := wanted.grouped(bits))}


def expected_divergence(
    indicators: Indicators | None, graph: LayerGraph, policy: Policy | None, *, weight_only: bool = False
) -> dict[str, tuple[float, float | None]]:
    """Estimate the divergence that a policy causes in each layer.

    Returns:
        `{searched layer: (divergence, its relative standard error or None)}`; empty if the scores are not divergences,
        or are for other layers or bit-widths than those of the policy.
    """
    if indicators is None or policy is None or not indicators.predicts:
        return {}
    try:
        table, _ = score_table(indicators, graph, weight_only=weight_only)
    except InvalidArgument:
        return {}
    if any(policy.bits[name] not in row for name, row in table.items()):
        return {}
    return {name: (row[policy.bits[name]], indicators.standard_error.get(name)) for name, row in table.items()}


def score_parts(
    indicators: Indicators, scores: Scores, alpha: float
) -> dict[str, dict[LayerBits, tuple[float, float]]]:
    """Split scores into the parts of the weight and the input; scores of pairs count as the weight's.

    Args:
        indicators: The indicators that the scores were built from.
        scores: The scores, as returned by `score_table`.
        alpha: The multiplier, as returned by `score_table`.

    Returns:
        `{layer: {bit-widths: (part of the weight, part of the input)}}`.
    """
    out: dict[str, dict[LayerBits, tuple[float, float]]] = {}
    for name, row in scores.items():
        weight = {} if indicators.pairs else indicators.weight[name]
        parts = {bits: alpha * weight[bits.weight] if weight else score for bits, score in row.items()}
        out[name] = {bits: (parts[bits], score - parts[bits]) for bits, score in row.items()}
    return out


def candidates_of(scores: Scores) -> dict[str, Candidates]:
    """Return `{layer: all bit-widths that have a score}`."""
    found = {
        name: Candidates(
            tuple({bits.weight for bits in row}),
            tuple({bits.activation for bits in row} - {FLOAT_BITS}) or (FLOAT_BITS,),
            tuple(dict.fromkeys(bits.group_size for bits in row)),
            all(bits.symmetric for bits in row),
        )
        for name, row in scores.items()
    }
    return {
        name: c if set(c.pairs) == set(scores[name]) else replace(c, menu=tuple(scores[name]))
        for name, c in found.items()
    }


def in_scored_groups(candidates: Mapping[str, Candidates], scores: Scores) -> dict[str, Candidates]:
    """Give candidates without groups or zero points those that were scored, where plain bit-widths were not.

    Args:
        candidates: `{layer: candidates}`.
        scores: `{layer: {bit-widths: score}}`, possibly of other layers.
    """
    out = dict(candidates)
    for name, c in candidates.items():
        row = {bits.of_weight for bits in scores.get(name, {}) if bits.weight in c.weight}
        if row and c.grids == ((None, True),) and all(bits.grouped for bits in row if bits.weight > 1):
            out[name] = replace(c, menu=tuple(row))
    return out


def limpq_scores(
    indicators: Indicators, graph: LayerGraph, candidates: Mapping[str, Candidates], alpha: float
) -> dict[str, dict[LayerBits, float]]:
    """Compute activation indicator + α · weight indicator of the searched layers; smaller is better.

    Returns:
        `{layer: {bit-widths: score}}`.

    Raises:
        InvalidArgument: A layer or a candidate bit-width has no indicator.
    """
    out: dict[str, dict[LayerBits, float]] = {}
    for layer in graph.searched:
        wanted, name = candidates[layer.name], layer.name
        weight = _pick(indicators.weight, name, wanted.weight, "weight")
        activation = (
            {FLOAT_BITS: 0.0}
            if layer.weight_only or wanted.float_inputs
            else _pick(indicators.activation, name, wanted.activation, "activation")
        )
        row = {LayerBits(w, a): activation[a] + alpha * weight[w] for w in weight for a in activation}
        out[name] = _in_groups(name, row, wanted)
    return out


def _pick(table: Mapping[str, Mapping[int, float]], name: str, widths: tuple[int, ...], what: str) -> dict[int, float]:
    row = table.get(name, {})
    if missing := [b for b in widths if b not in row]:
        raise InvalidArgument(
            f"layer {name!r} has no {what} indicator for {missing} bits; train indicators with these candidates"
        )
    return {b: row[b] for b in available({b: row[b] for b in widths})}
