"""The candidate bit-widths of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..core import FLOAT_BITS, Candidates, LayerBits, LayerGraph, matching
from ..core.bits import GroupSizes, check_group_sizes
from ..errors import InvalidArgument

CandidatesLike = Candidates | Iterable[int] | Mapping[str, "Candidates | Iterable[int]"] | None


def resolve_candidates(
    graph: LayerGraph, value: CandidatesLike, group_size: GroupSizes = None, symmetric: bool = True
) -> dict[str, Candidates]:
    """Resolve what a user passes as candidates to the candidates of each layer.

    Args:
        graph: The layers.
        value: A list of bit-widths or a `Candidates` for all layers, or `{kind or name pattern: either}`, where later
            entries override earlier ones and other layers take the default.
        group_size: Group sizes of candidates that have none, in layers whose weights can have groups.
        symmetric: False to give these layers zero points.

    Returns:
        `{searched layer: candidates}`.

    Raises:
        InvalidArgument: A key matches neither a kind nor a layer, or a group size is not valid.
    """
    sizes = check_group_sizes(group_size)
    found, layers = _widths(graph, value), {layer.name: layer for layer in graph.searched}
    plain = Candidates()
    for name, one in found.items():
        if not layers[name].takes_groups:
            found[name] = replace(one, group_size=plain.group_size, symmetric=True)
        elif one.group_size == plain.group_size and one.symmetric:
            found[name] = replace(one, group_size=sizes, symmetric=symmetric)
    return found


def check_one_grid(candidates: Mapping[str, Candidates]) -> None:
    """Check that no layer chooses among several group sizes, which scores of bit-widths alone cannot tell apart.

    Args:
        candidates: `{layer: candidates}`.

    Raises:
        InvalidArgument: A layer does.
    """
    for name, c in candidates.items():
        if any(len(c.grouped(LayerBits(width, FLOAT_BITS))) > 1 for width in c.weight):
            raise InvalidArgument(
                f"cannot choose among the group sizes of layer {name!r} by scores of bit-widths alone; use a "
                "post-training strategy with rounding='gptq' or 'nearest'"
            )


def weights_alone(graph: LayerGraph, candidates: Mapping[str, Candidates]) -> bool:
    """Whether all inputs stay float, including those of fixed layers."""
    fixed = {x.fixed.activation for x in graph if x.fixed is not None}
    return all(c.float_inputs for c in candidates.values()) and fixed <= {FLOAT_BITS}


def _widths(graph: LayerGraph, value: CandidatesLike) -> dict[str, Candidates]:
    if not isinstance(value, Mapping):
        one = Candidates.of(value)
        return {layer.name: one for layer in graph.searched}
    out = {layer.name: Candidates() for layer in graph.searched}
    for key, widths in value.items():
        chosen = Candidates.of(widths)
        named = matching([x.name for x in graph.searched], key)
        hits = [x.name for x in graph.searched if x.kind == key or x.name in named]
        if not hits:
            raise InvalidArgument(f"candidates: {key!r} matches no searched layer and no kind of layer")
        out.update(dict.fromkeys(hits, chosen))
    return out


def first_groups(candidates: Mapping[str, Candidates], asked: Iterable[int | None] = ()) -> tuple[int | None, bool]:
    """Return the group size and symmetry that a level in a budget stands for: the first available one of `asked`."""
    for c in candidates.values():
        if c.group_size != (None,) or not c.symmetric:
            return next((size for size in asked if size in c.group_size), c.group_size[0]), c.symmetric
    return None, True
