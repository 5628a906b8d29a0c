"""From indicators to one score per layer and pair of widths (LIMPQ §3.4)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from ..core import FLOAT_BITS, Candidates, Indicators, LayerBits, LayerGraph
from ..errors import InvalidArgument

Scores = Mapping[str, Mapping[LayerBits, float]]


def available(scales: Mapping[int, float]) -> list[int]:
    """Widths of a layer that joint training left usable, ascending.

    A scale below that of the next wider width is an outlier of the training; its width is dropped, but never the
    narrowest one, so that no budget becomes unreachable.
    """
    widths = sorted(scales)
    kept = {b for b, wider in pairwise(widths) if scales[b] >= scales[wider]}
    return [b for b in widths if b in kept or b in (widths[0], widths[-1])]


def balance(indicators: Indicators) -> float:
    """Default α: Σ activation indicators / Σ weight indicators, so that both count alike [ours]."""
    weight = sum(s for row in indicators.weight.values() for s in row.values())
    activation = sum(s for row in indicators.activation.values() for s in row.values())
    return activation / weight if weight and activation else 1.0


def default_alpha(indicators: Indicators) -> float:
    """1 for indicators that are growths of the loss: weights and activations share the unit. Else `balance`."""
    return 1.0 if indicators.provenance.get("indicator") == "loss" else balance(indicators)


def limpq_scores(
    indicators: Indicators, graph: LayerGraph, candidates: Mapping[str, Candidates], alpha: float
) -> dict[str, dict[LayerBits, float]]:
    """{layer: {widths: activation indicator + α · weight indicator}} of the searched layers; smaller is better.

    Raises InvalidArgument when a layer or a candidate width has no indicator.
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
        out[name] = {LayerBits(w, a): activation[a] + alpha * weight[w] for w in weight for a in activation}
    return out


def _pick(table: Mapping[str, Mapping[int, float]], name: str, widths: tuple[int, ...], what: str) -> dict[int, float]:
    row = table.get(name, {})
    if missing := [b for b in widths if b not in row]:
        raise InvalidArgument(f"layer {name!r} has no {what} indicator for {missing} bits; train them with candidates")
    return {b: row[b] for b in available({b: row[b] for b in widths})}
