"""What a model is to the search: its layers, by name."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import InvalidArgument
from .bits import FLOAT_BITS, LayerBits
from .layer_kind import layer_kinds


@dataclass(frozen=True)
class LayerSpec:
    """One quantizable layer.

    `kind`: name of its LayerKind, such as conv2d, linear, conv1d (GPT-2's transposed linear), embedding, experts,
    projection (of attention).
    `weight_shape`: the module's own. `macs`: multiply-accumulates per sample, output area floored.
    `activation_count`: input features per sample. `activation_signed`: None until data have said so.
    `tie`: layers of one tie take the same widths. `activation_tie`: the same activation width only
    (q, k, v read one input). `weight_owner`: name of the layer whose Parameter this one shares (a tied
    head), None when it owns it. `fixed`: widths it keeps, None when it is searched. `input_owner`: name of the
    layer that reads this one's input tensor first, None when that is the layer itself or `activation_tie`.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    macs: int
    weight_count: int
    activation_count: int
    activation_signed: bool | None = None
    tie: str | None = None
    activation_tie: str | None = None
    weight_owner: str | None = None
    fixed: LayerBits | None = None
    input_owner: str | None = None

    @property
    def buffer(self) -> str:
        """The same for all layers that read one tensor: the name of the first of them."""
        return self.input_owner or self.activation_tie or self.name

    @property
    def weight_only(self) -> bool:
        """Whether it has no activation to quantize: an embedding reads indices, experts' inputs stay float."""
        kind = layer_kinds.get(self.kind)
        return kind.reads_indices or kind.weight_only

    @property
    def takes_groups(self) -> bool:
        """Whether the weight is packed row by row, so that parts of a row can have scales of their own."""
        return layer_kinds.get(self.kind).row_axes is not None

    def fitted(self, bits: LayerBits) -> LayerBits:
        """A level as this layer can take it: with a float input where it is weight-only, without groups and zero points
        where its weight is not packed row by row."""
        bits = bits if self.takes_groups else bits.with_groups(None)
        return bits.of_weight if self.weight_only else bits


@dataclass(frozen=True)
class FloatOp:
    """Work that stays float and counts 32×32: attention products, layers with no quantized form, excluded ones."""

    name: str
    kind: str
    macs: int
    weight_count: int
    reason: str


NOT_RUN = "it does not run in the traced forward"
"""Reason of a FloatOp that the example input did not reach."""


@dataclass(frozen=True)
class LayerGraph:
    """The layers of one model in the order they run, and what stays float.

    `input_shape`: per sample, without the batch axis. `other_bytes`: bytes of every tensor of the state
    dict that is no quantized layer's weight (biases, norms, buffers), as stored.
    """

    model_id: str
    revision: str | None
    library: str
    input_shape: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    floats: tuple[FloatOp, ...] = ()
    other_bytes: int = 0

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerSpec:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @property
    def searched(self) -> tuple[LayerSpec, ...]:
        return tuple(layer for layer in self.layers if layer.fixed is None)

    def not_run(self) -> tuple[float, tuple[str, ...]]:
        """What the example input did not reach: its share of the weights of all layers, and the outermost modules of
        which nothing ran."""
        missed = [op for op in self.floats if op.reason == NOT_RUN and op.weight_count]
        own = sum(layer.weight_count for layer in self.layers if layer.weight_owner is None)
        whole = own + sum(op.weight_count for op in self.floats)
        ran = [*self.names, *(op.name for op in self.floats if op.reason != NOT_RUN)]
        reached = {prefix for name in ran for prefix in _prefixes(name)}
        modules = (next((p for p in _prefixes(op.name) if p not in reached), op.name) for op in missed)
        return sum(op.weight_count for op in missed) / max(whole, 1), tuple(dict.fromkeys(modules))

    def check_layers(self, *, searched: bool = True) -> None:
        """Raise InvalidArgument, with the reasons, when no layer can be quantized.

        Args:
            searched: Also raise when all layers are fixed.
        """
        if not self.layers:
            kept = {op.reason: op.name for op in self.floats if op.weight_count}
            why = "".join(f"; {name}: {reason}" for reason, name in list(kept.items())[:2])
            raise InvalidArgument(f"no layer of {self.model_id!r} can be quantized{why}")
        if searched and not self.searched:
            raise InvalidArgument("every layer is fixed: there is nothing to search")

    def match(self, pattern: str) -> tuple[str, ...]:
        """Names of the layers that a name or glob pattern means; InvalidArgument when it means none."""
        names = matching(self.names, pattern)
        if not names:
            for op in self.floats:
                if op.weight_count and matching([op.name], pattern):
                    raise InvalidArgument(f"layer pattern {pattern!r}: {op.name!r} stays float, {op.reason}")
            some = ", ".join(self.names[:4])
            raise InvalidArgument(f"layer pattern {pattern!r} matches none of the {len(self)} layers ({some}, …)")
        return names

    def with_fixed(self, pins: Mapping[str, LayerBits | str | None]) -> LayerGraph:
        """A graph with layers pinned by name or pattern; None frees them for the search."""
        fixed = {layer.name: layer.fixed for layer in self.layers}
        for pattern, bits in pins.items():
            level = LayerBits.parse(bits) if isinstance(bits, str) else bits
            if level is not None and level.weight == FLOAT_BITS:
                raise InvalidArgument(
                    f"pin {pattern!r}: a layer with a float weight is left out by exclude=, not pinned"
                )
            for name in self.match(pattern):
                fixed[name] = None if level is None else self[name].fitted(level)
        for layer in self.layers:
            mine, owner = fixed[layer.name], fixed.get(layer.weight_owner or "")
            if layer.weight_owner in fixed and (mine and mine.of_weight) != (owner and owner.of_weight):
                raise InvalidArgument(
                    f"layers {layer.name!r} and {layer.weight_owner!r} share one weight: pin or free both alike"
                )
        return replace(self, layers=tuple(replace(layer, fixed=fixed[layer.name]) for layer in self.layers))

    def with_tied_inputs(self) -> LayerGraph:
        """A graph in which layers that read one input (q, k, v; gate, up) share the weight width too.

        Runtimes that compute them as one matrix need that. Raises InvalidArgument when some of them are pinned and
        others searched, or pinned to different widths.
        """
        groups: dict[str, set[LayerBits | None]] = {}
        for layer in self.layers:
            if layer.activation_tie is not None:
                groups.setdefault(layer.activation_tie, set()).add(layer.fixed)
        if mixed := sorted(name for name, pins in groups.items() if len(pins) > 1):
            raise InvalidArgument(
                f"the layers that read one input with {mixed[0]!r} are pinned differently: pin all alike"
            )
        return replace(
            self, layers=tuple(replace(layer, tie=layer.tie or layer.activation_tie) for layer in self.layers)
        )

    def with_one_width_per_input(self) -> LayerGraph:
        """A graph in which all layers that read one tensor take one activation width."""
        return replace(self, layers=tuple(replace(layer, activation_tie=layer.buffer) for layer in self.layers))

    def with_shared_weights(self, bits: Mapping[str, LayerBits]) -> dict[str, LayerBits]:
        """Widths of layers, in which an embedding has the weight width of the layer that shares its weight."""
        out = dict(bits)
        for layer in self.layers:
            owner = layer.weight_owner
            if owner in out and layer.name in out and not layer.weight_only and self[owner].weight_only:
                out[owner] = out[layer.name].of_weight
        return out

    def at(self, bits: Mapping[str, LayerBits]) -> LayerGraph:
        """The graph with its fixed layers at the widths of a policy, which may be others than the graph's own."""
        layers = (x if x.fixed is None else replace(x, fixed=bits[x.name]) for x in self.layers)
        return replace(self, layers=tuple(layers))

    def counted_on(self, other: LayerGraph) -> LayerGraph:
        """The same layers with the counts of another graph of this model, which was traced on another input."""
        layers = {layer.name: layer for layer in other}
        work = {(op.name, op.kind): op.macs for op in other.floats}

        def layer(x: LayerSpec) -> LayerSpec:
            new = layers.get(x.name, x)
            return replace(x, macs=new.macs, activation_count=new.activation_count)

        def macs(op: FloatOp) -> int:  # the other graph may quantize what this one excludes
            return work.get((op.name, op.kind), layers[op.name].macs if op.name in layers else op.macs)

        return replace(
            self,
            input_shape=other.input_shape,
            layers=tuple(map(layer, self.layers)),
            floats=tuple(replace(op, macs=macs(op)) for op in self.floats),
        )

    @property
    def digest(self) -> str:
        """sha256 (hex) of the layers' names, kinds and shapes: two models with one digest take one policy."""
        rows = [[layer.name, layer.kind, list(layer.weight_shape)] for layer in sorted(self.layers, key=_name)]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        out = asdict(self)
        for row, layer in zip(out["layers"], self.layers, strict=True):
            row["fixed"] = str(layer.fixed) if layer.fixed else None
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerGraph:
        def layer(row: Mapping[str, Any]) -> LayerSpec:
            fixed = LayerBits.parse(row["fixed"]) if row["fixed"] else None
            return LayerSpec(**{**row, "weight_shape": tuple(row["weight_shape"]), "fixed": fixed})

        return cls(
            **{
                **data,
                "input_shape": tuple(data["input_shape"]),
                "layers": tuple(layer(row) for row in data["layers"]),
                "floats": tuple(FloatOp(**row) for row in data["floats"]),
            }
        )


def matching(names: Iterable[str], pattern: str) -> tuple[str, ...]:
    """The names that a pattern means: the one that is the pattern, brackets and all, or else those it matches.

    Args:
        names: All there are.
        pattern: A name or a glob pattern.
    """
    names = tuple(names)
    return (pattern,) if pattern in names else tuple(name for name in names if fnmatch.fnmatchcase(name, pattern))


def _name(layer: LayerSpec) -> str:
    return layer.name


def _prefixes(name: str) -> list[str]:
    """Names of the modules that hold a layer, the outermost first, and its own."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
