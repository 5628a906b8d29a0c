"""The manifest of a packed file: its layers, its policy, and how it was made."""

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
"""Bytes reserved for the provenance in the header, so that a file's size is known before its figures are."""

_OPTIONAL = ("input_owner",)
"""Columns that are written only if a layer has a value in them."""
_LAYER = [f.name for f in fields(LayerSpec) if f.name not in _OPTIONAL]
_FLOAT = [f.name for f in fields(FloatOp)]


@dataclass(frozen=True)
class Manifest:
    """The description of a packed model that its file contains.

    Args:
        base_model: Id of the float model.
        revision: Revision of the float model, or None.
        library: Library of the float model, such as `"timm"`.
        graph: Its layers.
        policy: Bit-widths of exactly these layers.
        provenance: How it was made and measured, JSON values.

    Example:
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.pack import Manifest
        >>> graph = HubMPQ.from_pretrained("test_resnet", pretrained=False).graph
        >>> manifest = Manifest("test_resnet", None, "timm", graph, Policy.uniform(graph, "W4A4"))
        >>> manifest.format_version
        1
        >>> Manifest.from_text(manifest.to_text()) == manifest
        True
    """

    base_model: str
    revision: str | None
    library: str
    graph: LayerGraph
    policy: Policy
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def format_version(self) -> int:
        """The oldest format version that can represent it: 2 if a layer has groups or zero points, else 1."""
        levels = (*self.policy.bits.values(), *(x.fixed for x in self.graph if x.fixed is not None))
        return 2 if any(level.grouped for level in levels) else 1

    def to_text(self) -> str:
        """Convert to canonical JSON.

        Returns:
            The JSON.

        Raises:
            PolicyMismatch: The policy is for other layers.
            InvalidArgument: The provenance is not JSON.
        """
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
        """Parse and check the JSON of `to_text`.

        Args:
            text: The JSON.
            version: Format version of the file; version 1 has neither groups nor zero points.

        Returns:
            The manifest.

        Raises:
            InvalidArgument: The manifest is invalid, or has a kind of layer that is not registered.
            PolicyMismatch: The policy is for other layers.
        """
        tree = load_json(text, "the manifest")
        try:
            manifest = cls._parse(tree)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgument(f"the manifest is invalid: {error}") from None
        for layer in manifest.graph:
            if layer.kind not in layer_kinds:
                raise InvalidArgument(
                    f"layer {layer.name!r:.80} has unknown kind {layer.kind!r:.40}; register it with "
                    "hub_mpq.core.register_layer_kind"
                )
        _check_owners(manifest)
        manifest.policy.check(manifest.graph)
        check_provenance(manifest.provenance)
        if manifest.format_version > version:
            raise InvalidArgument(f"groups and zero points require format version 2, got a file of version {version}")
        return manifest

    @classmethod
    def _parse(cls, tree: Any) -> Manifest:
        head = _typed(tree, _MANIFEST)
        layers, bits = [], {}
        for row in _table(head["layers"], {**_LAYER_TYPES, "bits": _text}, _OPTIONAL):
            level, fixed = LayerBits.parse(row.pop("bits")), row["fixed"]
            layer = LayerSpec(**{**row, "fixed": None if fixed is None else LayerBits.parse(fixed)})
            if layer.weight_count != math.prod(layer.weight_shape):
                raise InvalidArgument(f"layer {layer.name!r:.80}: weight_count does not match weight_shape")
            if layer.name in bits:
                raise InvalidArgument(f"duplicate layer {layer.name!r}")
            layers.append(layer)
            bits[layer.name] = level
        floats = tuple(FloatOp(**row) for row in _table(head["floats"], _FLOAT_TYPES))
        graph = LayerGraph(**_typed(head["graph"], _GRAPH), layers=tuple(layers), floats=floats)
        if graph.digest != head["graph_digest"]:
            raise InvalidArgument("graph_digest does not match the layers")
        return cls(
            head["base_model"], head["revision"], head["library"], graph, Policy(bits, graph.digest), head["provenance"]
        )


def _check_owners(manifest: Manifest) -> None:
    """Raise InvalidArgument unless each shared weight belongs to another layer, and both can read it."""
    layers, bits = {layer.name: layer for layer in manifest.graph}, manifest.policy.bits
    for layer in manifest.graph:
        if layer.weight_owner is None:
            continue
        owner = layers.get(layer.weight_owner)
        if owner is None or owner.weight_owner is not None:
            raise InvalidArgument(
                f"layer {layer.name!r:.80}: weight_owner {layer.weight_owner!r:.80} must be a layer with its own weight"
            )
        mine, its = layer_kinds.get(layer.kind), layer_kinds.get(owner.kind)
        if (
            (mine.channel_axis, mine.row_axes, layer.weight_shape)
            != (its.channel_axis, its.row_axes, owner.weight_shape)
        ) or bits[layer.name].of_weight != bits[owner.name].of_weight:
            raise InvalidArgument(
                f"layer {layer.name!r:.80} cannot share the weight of {owner.name!r:.80}: their kind, shape or "
                "bit-width differs"
            )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"expected a string, got {dump_json(value)[:40]}")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise InvalidArgument(f"expected a non-negative integer, got {dump_json(value)[:40]}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 16:
        raise InvalidArgument(f"expected a shape, got {dump_json(value)[:40]}")
    return tuple(_number(v) for v in value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"expected true or false, got {dump_json(value)[:40]}")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"expected an object, got {dump_json(value)[:40]}")
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
        raise InvalidArgument(f"expected the keys {sorted(types)}, got {sorted(row)[:12]}")
    return {name: check(row[name]) for name, check in types.items() if name in row}


def _plain(value: Any) -> Any:
    """Bit-widths as strings; other values unchanged."""
    return str(value) if isinstance(value, LayerBits) else value


def _table(table: Mapping[str, Any], types: _Types, optional: Iterable[str] = ()) -> list[dict[str, Any]]:
    columns = table["columns"]
    if set(table) != {"columns", "rows"} or not isinstance(columns, list) or not isinstance(table["rows"], list):
        raise InvalidArgument("a table must have columns and rows")
    if any(not isinstance(row, list) or len(row) != len(columns) for row in table["rows"]):
        raise InvalidArgument("each row of a table must have one value per column")
    if len(set(map(_text, columns))) != len(columns):
        raise InvalidArgument("the columns of a table must be unique")
    return [_typed(dict(zip(columns, row, strict=True)), types, optional) for row in table["rows"]]
