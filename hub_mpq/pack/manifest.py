"""What a packed file says about itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Any

from ..core import FloatOp, LayerBits, LayerGraph, LayerSpec, Policy, layer_kinds
from ..errors import InvalidArgument
from .canonical import dump_json, load_json
from .header import FORMAT_VERSION
from .provenance import check_provenance

PROVENANCE_RESERVE = 2048
"""Bytes the provenance always takes in the header, so that a file's size is known before its figures are."""

_OPTIONAL = ("input_owner",)
"""Columns that are written only where a layer has something to say in them."""
_LAYER = [f.name for f in fields(LayerSpec) if f.name not in _OPTIONAL]
_FLOAT = [f.name for f in fields(FloatOp)]


@dataclass(frozen=True)
class Manifest:
    """Where a packed model comes from and what it is.

    `base_model`, `revision`, `library`: the float model. `graph`: its layers. `policy`: their widths, of exactly
    the layers of `graph`. `provenance`: how it was made and measured, JSON values only.
    """

    base_model: str
    revision: str | None
    library: str
    graph: LayerGraph
    policy: Policy
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def format_version(self) -> int:
        """The oldest version of the format that can hold it: 2 where a layer has groups or zero points, else 1."""
        levels = (*self.policy.bits.values(), *(x.fixed for x in self.graph if x.fixed is not None))
        return 2 if any(level.grouped for level in levels) else 1

    def to_text(self) -> str:
        """Canonical JSON. PolicyMismatch when the policy is for other layers; InvalidArgument if it is no JSON."""
        self.policy.check(self.graph)
        graph = self.graph
        columns = [*_LAYER, *(name for name in _OPTIONAL if any(getattr(layer, name) for layer in graph))]
        rows = [
            [*(_plain(getattr(layer, name)) for name in columns), str(bits)]
            for layer, bits in ((layer, self.policy.bits[layer.name]) for layer in graph)
        ]
        return dump_json(
            {
                "base_model": self.base_model,
                "revision": self.revision,
                "library": self.library,
                "provenance": dict(self.provenance),
                "graph_digest": graph.digest,
                "graph": {
                    "model_id": graph.model_id,
                    "revision": graph.revision,
                    "library": graph.library,
                    "input_shape": list(graph.input_shape),
                    "other_bytes": graph.other_bytes,
                },
                "layers": {"columns": [*columns, "bits"], "rows": rows},
                "floats": {"columns": _FLOAT, "rows": [list(astuple(op)) for op in graph.floats]},
            }
        )

    @classmethod
    def from_text(cls, text: str, version: int = FORMAT_VERSION) -> Manifest:
        """The inverse of to_text, trusting nothing; InvalidArgument names what is wrong, or the unregistered kind.

        version: Of the file; one of version 1 has no groups and no zero points.
        """
        tree = load_json(text, "the manifest")
        try:
            manifest = cls._parse(tree)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgument(f"the manifest is wrong: {error}") from None
        for layer in manifest.graph:
            if layer.kind not in layer_kinds:
                raise InvalidArgument(
                    f"layer {layer.name!r:.80} is of kind {layer.kind!r:.40}, which nobody registered; "
                    "hub_mpq.core.register_layer_kind makes a kind known"
                )
        _check_owners(manifest)
        manifest.policy.check(manifest.graph)
        check_provenance(manifest.provenance)
        if manifest.format_version > version:
            raise InvalidArgument(f"a file of format version {version} has no groups and no zero points")
        return manifest

    @classmethod
    def _parse(cls, tree: Any) -> Manifest:
        head = _typed(tree, _MANIFEST)
        layers, bits = [], {}
        for row in _table(head["layers"], {**_LAYER_TYPES, "bits": _text}, _OPTIONAL):
            level, fixed = LayerBits.parse(row.pop("bits")), row["fixed"]
            layer = LayerSpec(**{**row, "fixed": None if fixed is None else LayerBits.parse(fixed)})
            if layer.weight_count != math.prod(layer.weight_shape):
                raise InvalidArgument(f"layer {layer.name!r:.80}: weight_count disagrees with weight_shape")
            if layer.name in bits:
                raise InvalidArgument(f"duplicate layer {layer.name!r}")
            layers.append(layer)
            bits[layer.name] = level
        floats = tuple(FloatOp(**row) for row in _table(head["floats"], _FLOAT_TYPES))
        graph = LayerGraph(**_typed(head["graph"], _GRAPH), layers=tuple(layers), floats=floats)
        if graph.digest != head["graph_digest"]:
            raise InvalidArgument("graph_digest disagrees with the layers")
        return cls(
            head["base_model"], head["revision"], head["library"], graph, Policy(bits, graph.digest), head["provenance"]
        )


def _check_owners(manifest: Manifest) -> None:
    """InvalidArgument unless every shared weight is another layer's own, and both can read it."""
    layers, bits = {layer.name: layer for layer in manifest.graph}, manifest.policy.bits
    for layer in manifest.graph:
        if layer.weight_owner is None:
            continue
        owner = layers.get(layer.weight_owner)
        if owner is None or owner.weight_owner is not None:
            raise InvalidArgument(
                f"layer {layer.name!r:.80}: its weight_owner {layer.weight_owner!r:.80} has no weight of its own"
            )
        mine, its = layer_kinds.get(layer.kind), layer_kinds.get(owner.kind)
        if (
            (mine.channel_axis, mine.row_axes, layer.weight_shape)
            != (its.channel_axis, its.row_axes, owner.weight_shape)
        ) or bits[layer.name].of_weight != bits[owner.name].of_weight:
            raise InvalidArgument(
                f"layer {layer.name!r:.80} can't share the weight of {owner.name!r:.80}: kind, shape or width differ"
            )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"expected text, not {dump_json(value)[:40]}")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise InvalidArgument(f"expected a whole number, not {dump_json(value)[:40]}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 16:
        raise InvalidArgument(f"expected a shape, not {dump_json(value)[:40]}")
    return tuple(_number(v) for v in value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"expected true or false, not {dump_json(value)[:40]}")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"expected an object, not {dump_json(value)[:40]}")
    return value


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


_Types = Mapping[str, Callable[[Any], Any]]

_MANIFEST: _Types = {
    **{"base_model": _text, "revision": _optional(_text), "library": _text, "provenance": _mapping},
    **{"graph_digest": _text, "graph": _mapping, "layers": _mapping, "floats": _mapping},
}
_GRAPH: _Types = {
    **{"model_id": _text, "revision": _optional(_text), "library": _text, "input_shape": _shape},
    **{"other_bytes": _number},
}
_LAYER_TYPES: _Types = {
    **{"name": _text, "kind": _text, "weight_shape": _shape, "macs": _number, "weight_count": _number},
    **{"activation_count": _number, "activation_signed": _optional(_flag), "tie": _optional(_text)},
    **{"activation_tie": _optional(_text), "weight_owner": _optional(_text), "fixed": _optional(_text)},
    **{"input_owner": _optional(_text)},
}
_FLOAT_TYPES: _Types = {
    **{"name": _text, "kind": _text, "macs": _number, "weight_count": _number, "reason": _text},
}


def _typed(row: Any, types: _Types, optional: Iterable[str] = ()) -> dict[str, Any]:
    if (set(_mapping(row)) | set(optional)) != set(types):
        raise InvalidArgument(f"keys {sorted(row)[:12]}, expected {sorted(types)}")
    return {name: check(row[name]) for name, check in types.items() if name in row}


def _plain(value: Any) -> Any:
    """Widths as text, everything else as it is."""
    return str(value) if isinstance(value, LayerBits) else value


def _table(table: Mapping[str, Any], types: _Types, optional: Iterable[str] = ()) -> list[dict[str, Any]]:
    columns = table["columns"]
    if set(table) != {"columns", "rows"} or not isinstance(columns, list) or not isinstance(table["rows"], list):
        raise InvalidArgument("a table has columns and rows")
    if any(not isinstance(row, list) or len(row) != len(columns) for row in table["rows"]):
        raise InvalidArgument("a row of a table has another length than its columns")
    if len(set(map(_text, columns))) != len(columns):
        raise InvalidArgument("a column stands twice")
    return [_typed(dict(zip(columns, row, strict=True)), types, optional) for row in table["rows"]]
