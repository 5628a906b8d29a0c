"""Which widths each layer may take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..core import Candidates, LayerGraph, matching
from ..errors import InvalidArgument

CandidatesLike = Candidates | Iterable[int] | Mapping[str, "Candidates | Iterable[int]"] | None


def resolve_candidates(graph: LayerGraph, value: CandidatesLike) -> dict[str, Candidates]:
    """{searched layer: candidates}.

    value: one list of widths for all, a Candidates, or {kind or name pattern: either} where later entries win and
    layers that none names take the default. Raises InvalidArgument for a key that is no kind and matches no layer.
    """
    if not isinstance(value, Mapping):
        one = Candidates.of(value)
        return {layer.name: one for layer in graph.searched}
    out = {layer.name: Candidates() for layer in graph.searched}
    for key, widths in value.items():
        chosen = Candidates.of(widths)
        named = matching([x.name for x in graph.searched], key)
        hits = [x.name for x in graph.searched if x.kind == key or x.name in named]
        if not hits:
            raise InvalidArgument(f"candidates: {key!r} is no kind of layer and matches no searched layer")
        out.update(dict.fromkeys(hits, chosen))
    return out
