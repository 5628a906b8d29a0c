"""Layers that read the same input quantize it once: they share activation bits, but not weight bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..core import FLOAT_BITS, Candidates, LayerBits, LayerGraph
from ..errors import InvalidArgument

Row = Mapping[LayerBits, tuple[float, dict[str, float]]]
Combo = tuple[dict[str, LayerBits], float, dict[str, float]]


def merge_inputs(
    graph: LayerGraph, rows: Mapping[str, Row], sense: str
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, dict[str, LayerBits]]]]:
    """Build one table row for each group of layers that read the same input, and for each other layer.

    The choices of a group are the products of its layers' weight bits, at each number of activation bits. An embedding
    that shares its weight with a layer of a group (a tied head) joins the group, because its own choices do not include
    inputs. While a group is built, products that another one dominates in score and in every cost are omitted. This is
    exact, and leaves dozens of choices for q, k, v instead of hundreds.

    Returns:
        (table rows, `{row: {choice: {layer: bit-widths}}}`).

    Raises:
        InvalidArgument: Layers of a group have no common choice.
    """
    groups: dict[str, list[str]] = {}
    tied: dict[str, str] = {}
    for layer in sorted(graph.searched, key=lambda x: x.weight_only):
        key = layer.name if layer.activation_tie is None else f"input:{layer.activation_tie}"
        if layer.tie is not None:
            key = tied.setdefault(layer.tie, key) if layer.weight_only else key
            tied.setdefault(layer.tie, key)
        groups.setdefault(key, []).append(layer.name)
    table: dict[str, dict[str, Any]] = {}
    meaning: dict[str, dict[str, dict[str, LayerBits]]] = {}
    for names in groups.values():
        combos = _product(names, rows, sense, {name: graph[name].tie for name in names})
        if not combos:
            raise InvalidArgument(f"layers {', '.join(names)} must share bit-widths and have no common candidate")
        row = names[0] if len(names) == 1 else "+".join(names)
        labels = [_label(bits) for bits, _, _ in combos]
        table[row] = {
            label: {"score": score, "cost": cost} for label, (_, score, cost) in zip(labels, combos, strict=True)
        }
        meaning[row] = {label: bits for label, (bits, _, _) in zip(labels, combos, strict=True)}
    return table, meaning


def shared_widths(
    graph: LayerGraph, candidates: Mapping[str, Candidates], *, inputs: bool
) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Group the searched layers that must have the same bit-width.

    Args:
        graph: The layers of the model.
        candidates: `{layer: candidates}`.
        inputs: False for weight bits, which tied layers share. True for activation bits, which are shared by tied
            layers, by layers that read the same input, and by layers that are connected by both.

    Yields:
        (names of the layers, bit-widths that are candidates of all of them).

    Raises:
        InvalidArgument: Layers of a group have no common candidate.
    """
    groups: list[tuple[set[tuple[str, str]], list[str]]] = []
    for layer in graph.searched:
        keys = {("layer", layer.name)}
        if layer.tie is not None and not (inputs and layer.weight_only):
            keys.add(("tie", layer.tie))
        if inputs and layer.activation_tie is not None:
            keys.add(("input", layer.activation_tie))
        joined = [group for group in groups if group[0] & keys]
        names = [name for _, members in joined for name in members] + [layer.name]
        groups = [group for group in groups if group not in joined]
        groups.append((keys.union(*(k for k, _ in joined)), names))
    for _, names in groups:
        sets = [candidates[name].activation if inputs else candidates[name].weight for name in names]
        common = set(sets[0]).intersection(*sets)
        if not common:
            what = "activation" if inputs else "weight"
            raise InvalidArgument(f"layers {', '.join(names)} must share {what} bits and have no common candidate")
        yield names, tuple(sorted(common))


def widest_of_ties(
    graph: LayerGraph, bits: Mapping[str, LayerBits], candidates: Mapping[str, Candidates]
) -> dict[str, LayerBits]:
    """Make bit-widths consistent with candidates and ties: layers that share one take the widest of theirs."""
    weight: dict[str, int] = {}
    activation: dict[str, int] = {}
    for names, widths in shared_widths(graph, candidates, inputs=False):
        weight |= dict.fromkeys(names, _at_least(max(bits[name].weight for name in names), widths))
    for names, widths in shared_widths(graph, candidates, inputs=True):
        activation |= dict.fromkeys(names, _at_least(max(bits[name].activation for name in names), widths))
    return {
        x.name: LayerBits(weight[x.name], FLOAT_BITS if x.weight_only else activation[x.name]) for x in graph.searched
    }


def _at_least(bits: int, widths: Sequence[int]) -> int:
    """Return the narrowest of the bit-widths that is at least `bits`, else the widest."""
    return next((b for b in widths if b >= bits), widths[-1])


def _label(bits: Mapping[str, LayerBits]) -> str:
    widths = list(bits.values())
    if len(widths) == 1:
        return str(widths[0])
    return "".join(str(b.of_weight).partition("A")[0] for b in widths) + f"A{min(b.activation for b in widths)}"


def _product(names: list[str], rows: Mapping[str, Row], sense: str, ties: Mapping[str, str | None]) -> list[Combo]:
    if len(names) == 1:
        return [({names[0]: bits}, score, cost) for bits, (score, cost) in rows[names[0]].items()]
    sets = [{bits.activation for bits in rows[name]} for name in names]
    shared = set.intersection(*([s for s in sets if s != {FLOAT_BITS}] or sets))
    out: list[Combo] = []
    for activation in sorted(shared):
        combos: list[Combo] = [({}, 0.0, {})]
        for i, name in enumerate(names):
            options = [(b, *rows[name][b]) for b in rows[name] if b.activation in (activation, FLOAT_BITS)]
            combos = [
                ({**bits, name: b}, score + s, {k: cost.get(k, 0) + c[k] for k in c})
                for bits, score, cost in combos
                for b, s, c in options
                if all(bits[n].of_weight == b.of_weight for n in bits if ties[name] and ties[n] == ties[name])
            ]
            # bit-widths that a later layer must share cannot be dropped yet
            later = {ties[n] for n in names[i + 1 :]} - {None}
            alike: dict[tuple[LayerBits, ...], list[Combo]] = {}
            for combo in combos:
                shares = tuple(b.of_weight for n, b in combo[0].items() if ties[n] in later)
                alike.setdefault(shares, []).append(combo)
            combos = [combo for group in alike.values() for combo in _undominated(group, sense)]
        out += combos
    return out


def _undominated(combos: list[Combo], sense: str) -> list[Combo]:
    sign = 1 if sense == "min" else -1
    kept: list[Combo] = []
    for combo in sorted(combos, key=lambda c: (sign * c[1], *c[2].values())):
        if not any(all(k[2][n] <= combo[2][n] for n in combo[2]) for k in kept):
            kept.append(combo)
    return kept
