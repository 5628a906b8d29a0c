"""Layers that read one input quantize it once: they share the activation width, not the weight width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..spec import LayerBits, LayerGraph

Row = Mapping[LayerBits, tuple[float, dict[str, float]]]
Combo = tuple[dict[str, LayerBits], float, dict[str, float]]


def merge_inputs(
    graph: LayerGraph, rows: Mapping[str, Row], sense: str
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, dict[str, LayerBits]]]]:
    """(table rows, their meaning): one row per group of layers that read one input, one per other layer.

    A group's choices are the products of its layers' weight widths at one activation width. Products that another
    beats in score and in every cost are left out while the group is built: exact, and it keeps q, k, v at some
    dozens of choices instead of hundreds.
    """
    groups: dict[str, list[str]] = {}
    for layer in graph.searched:
        key = layer.activation_tie if layer.activation_tie is not None else layer.name
        groups.setdefault(f"input:{key}" if layer.activation_tie is not None else key, []).append(layer.name)
    table: dict[str, dict[str, Any]] = {}
    meaning: dict[str, dict[str, dict[str, LayerBits]]] = {}
    for names in groups.values():
        combos = _product(names, rows, sense, {name: graph[name].tie for name in names})
        row = names[0] if len(names) == 1 else "+".join(names)
        labels = [_label(bits) for bits, _, _ in combos]
        table[row] = {
            label: {"score": score, "cost": cost} for label, (_, score, cost) in zip(labels, combos, strict=True)
        }
        meaning[row] = {label: bits for label, (bits, _, _) in zip(labels, combos, strict=True)}
    return table, meaning


def _label(bits: Mapping[str, LayerBits]) -> str:
    widths = list(bits.values())
    if len(widths) == 1:
        return str(widths[0])
    return "".join(f"W{b.weight}" for b in widths) + f"A{widths[0].activation}"


def _product(names: list[str], rows: Mapping[str, Row], sense: str, ties: Mapping[str, str | None]) -> list[Combo]:
    if len(names) == 1:
        return [({names[0]: bits}, score, cost) for bits, (score, cost) in rows[names[0]].items()]
    shared = set.intersection(*({bits.activation for bits in rows[name]} for name in names))
    out: list[Combo] = []
    for activation in sorted(shared):
        combos: list[Combo] = [({}, 0.0, {})]
        for name in names:
            options = [(b, *rows[name][b]) for b in rows[name] if b.activation == activation]
            combos = _undominated(
                [
                    ({**bits, name: b}, score + s, {k: cost.get(k, 0) + c[k] for k in c})
                    for bits, score, cost in combos
                    for b, s, c in options
                    if all(bits[n] == b for n in bits if ties[name] is not None and ties[n] == ties[name])
                ],
                sense,
            )
        out += combos
    return out


def _undominated(combos: list[Combo], sense: str) -> list[Combo]:
    sign = 1 if sense == "min" else -1
    kept: list[Combo] = []
    for combo in sorted(combos, key=lambda c: (sign * c[1], *c[2].values())):
        if not any(all(k[2][n] <= combo[2][n] for n in combo[2]) for k in kept):
            kept.append(combo)
    return kept
