"""The graph of a model: its layers, by name."""

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

    Args:
        name: Qualified name of the module.
        kind: Name of its `LayerKind`, such as "conv2d", "linear", "conv1d" (the transposed linear layer of GPT-2),
            "embedding", "experts" or "projection" (of attention).
        weight_shape: Shape of the module's weight.
        macs: Multiply-accumulates per sample, with the output area rounded down.
        weight_count: Number of weights.
        activation_count: Number of input features per sample.
        activation_signed: Whether the input can be negative; None until data have been seen.
        tie: Name shared by layers that must take the same bit-widths; None if there are no others.
        activation_tie: Name shared by layers that must take the same activation bit-width (q, k and v read one input).
        weight_owner: Name of the layer whose parameter this one shares (for a tied head); None if it owns its weight.
        fixed: Bit-widths that the layer keeps; None if it is searched.
        input_owner: Name of the first layer that reads this layer's input tensor; None if that is the layer itself or
            the one named by `activation_tie`.

    Example:
        >>> from hub_mpq.core import LayerSpec
        >>> layer = LayerSpec("fc", "linear", weight_shape=(10, 64), macs=640, weight_count=640, activation_count=64)
        >>> layer.takes_groups, layer.weight_only
        (True, False)
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
        """The name of the first layer that reads this layer's input; the same for all layers that read one tensor."""
        return self.input_owner or self.activation_tie or self.name

    @property
    def weight_only(self) -> bool:
        """Whether only the weight can be quantized: embeddings read indices, and the inputs of experts stay float."""
        kind = layer_kinds.get(self.kind)
        return kind.reads_indices or kind.weight_only

    @property
    def takes_groups(self) -> bool:
        """Whether the weight can have a group size and zero points, because it is packed row by row."""
        return layer_kinds.get(self.kind).row_axes is not None

    def fitted(self, bits: LayerBits) -> LayerBits:
        """Adapt a level to what this layer supports.

        Args:
            bits: The level.

        Returns:
            The level with a float input if the layer is weight-only, and without group size and zero points if its
            weight is not packed row by row.
        """
        bits = bits if self.takes_groups else bits.with_groups(None)
        return bits.of_weight if self.weight_only else bits


@dataclass(frozen=True)
class FloatOp:
    """Work that stays float: attention products, excluded layers, and layers that have no quantized form.

    It counts at 32×32 bits per multiply-accumulate in BitOps.

    Args:
        name: Name of the module.
        kind: What it computes, such as its type.
        macs: Multiply-accumulates per sample.
        weight_count: Number of weights.
        reason: Why it stays float.

    Example:
        >>> from hub_mpq.adapters import load
        >>> graph = load("test_resnet", meta=True, exclude=["fc"]).graph
        >>> [op.name for op in graph.floats]
        ['fc']
    """

    name: str
    kind: str
    macs: int
    weight_count: int
    reason: str


NOT_RUN = "it does not run in the traced forward"
"""Reason of a FloatOp that the example input did not reach."""


@dataclass(frozen=True)
class LayerGraph:
    """The layers of a model in the order in which they run, and the work that stays float.

    Iterating yields the layers, `len` counts them, and indexing by name returns one.

    Args:
        model_id: Id of the model.
        revision: Commit of the model on the Hub; None if there is none.
        library: Name of the library that the model comes from.
        input_shape: Shape of one input sample, without the batch axis.
        layers: The quantizable layers.
        floats: The work that stays float.
        other_bytes: Bytes of all tensors of the state dict that are not weights of quantizable layers (biases, norms,
            buffers), as stored.

    Example:
        >>> from hub_mpq.adapters import load
        >>> graph = load("test_resnet", meta=True).graph  # `HubMPQ.graph` of a model that is loaded with its weights
        >>> len(graph), graph["fc"].weight_shape
        (16, (1000, 96))
        >>> [layer.name for layer in graph.with_fixed({"*": "W8A8", "layer4.*conv1": None}).searched]
        ['layer4.0.conv1']
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
        """The names of all layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def searched(self) -> tuple[LayerSpec, ...]:
        """The layers that are not fixed."""
        return tuple(layer for layer in self.layers if layer.fixed is None)

    def not_run(self) -> tuple[float, tuple[str, ...]]:
        """Report what the example input did not reach.

        Returns:
            (the share of all layers' weights that never ran, the outermost modules of which nothing ran).
        """
        missed = [op for op in self.floats if op.reason == NOT_RUN and op.weight_count]
        own = sum(layer.weight_count for layer in self.layers if layer.weight_owner is None)
        whole = own + sum(op.weight_count for op in self.floats)
        ran = [*self.names, *(op.name for op in self.floats if op.reason != NOT_RUN)]
        reached = {prefix for name in ran for prefix in _prefixes(name)}
        modules = (next((p for p in _prefixes(op.name) if p not in reached), op.name) for op in missed)
        return sum(op.weight_count for op in missed) / max(whole, 1), tuple(dict.fromkeys(modules))

    def check_layers(self, *, searched: bool = True) -> None:
        """Check that there is a layer to quantize.

        Args:
            searched: Also require that not all layers are fixed.

        Raises:
            InvalidArgument: No layer can be quantized, with the reasons; or all layers are fixed.
        """
        if not self.layers:
            kept = {op.reason: op.name for op in self.floats if op.weight_count}
            why = "".join(f"; {name}: {reason}" for reason, name in list(kept.items())[:2])
            raise InvalidArgument(f"no layer of {self.model_id!r} can be quantized{why}")
        if searched and not self.searched:
            raise InvalidArgument("all layers are fixed: there is nothing to search")

    def match(self, pattern: str) -> tuple[str, ...]:
        """Find layers by name or glob pattern.

        Args:
            pattern: A name or a glob pattern.

        Returns:
            The names of the layers.

        Raises:
            InvalidArgument: No layer matches.
        """
        names = matching(self.names, pattern)
        if not names:
            for op in self.floats:
                if op.weight_count and matching([op.name], pattern):
                    raise InvalidArgument(f"layer pattern {pattern!r}: {op.name!r} stays float: {op.reason}")
            some = ", ".join(self.names[:4])
            raise InvalidArgument(f"layer pattern {pattern!r} matches none of the {len(self)} layers ({some}, …)")
        return names

    def with_fixed(self, pins: Mapping[str, LayerBits | str | None]) -> LayerGraph:
        """Return a graph with layers pinned to bit-widths.

        Args:
            pins: {name or glob pattern: level such as "W8A8", or None to let the search choose}.

        Returns:
            The new graph.

        Raises:
            InvalidArgument: A pattern matches no layer, a level is not valid or has a float weight, or layers that
                share a weight are pinned differently.
        """
        fixed = {layer.name: layer.fixed for layer in self.layers}
        for pattern, bits in pins.items():
            level = LayerBits.parse(bits) if isinstance(bits, str) else bits
            if level is not None and level.weight == FLOAT_BITS:
                raise InvalidArgument(f"cannot pin {pattern!r} to a float weight; exclude the layer with exclude=")
            for name in self.match(pattern):
                fixed[name] = None if level is None else self[name].fitted(level)
        for layer in self.layers:
            mine, owner = fixed[layer.name], fixed.get(layer.weight_owner or "")
            if layer.weight_owner in fixed and (mine and mine.of_weight) != (owner and owner.of_weight):
                raise InvalidArgument(
                    f"layers {layer.name!r} and {layer.weight_owner!r} share one weight: pin both to the same weight "
                    "bits, or neither"
                )
        return replace(self, layers=tuple(replace(layer, fixed=fixed[layer.name]) for layer in self.layers))

    def with_tied_inputs(self) -> LayerGraph:
        """Return a graph in which layers that read one input (q, k, v; gate, up) share their weight bit-width too.

        Runtimes that compute them as one matrix need this.

        Returns:
            The new graph.

        Raises:
            InvalidArgument: Some of these layers are pinned and others searched, or they are pinned differently.
        """
        groups: dict[str, set[LayerBits | None]] = {}
        for layer in self.layers:
            if layer.activation_tie is not None:
                groups.setdefault(layer.activation_tie, set()).add(layer.fixed)
        if mixed := sorted(name for name, pins in groups.items() if len(pins) > 1):
            raise InvalidArgument(
                f"the layers that read the same input as {mixed[0]!r} are pinned differently: pin all to the same bits"
            )
        return replace(
            self, layers=tuple(replace(layer, tie=layer.tie or layer.activation_tie) for layer in self.layers)
        )

    def with_one_width_per_input(self) -> LayerGraph:
        """Return a graph in which all layers that read one tensor share their activation bit-width.

        Returns:
            The new graph.
        """
        return replace(self, layers=tuple(replace(layer, activation_tie=layer.buffer) for layer in self.layers))

    def with_shared_weights(self, bits: Mapping[str, LayerBits]) -> dict[str, LayerBits]:
        """Give each embedding the weight bit-width of the layer that shares its weight.

        Args:
            bits: {layer: bit-widths}.

        Returns:
            The adapted bit-widths.
        """
        out = dict(bits)
        for layer in self.layers:
            owner = layer.weight_owner
            if owner in out and layer.name in out and not layer.weight_only and self[owner].weight_only:
                out[owner] = out[layer.name].of_weight
        return out

    def at(self, bits: Mapping[str, LayerBits]) -> LayerGraph:
        """Return the graph with its fixed layers at the bit-widths of a policy.

        Args:
            bits: {layer: bit-widths}; those of searched layers are ignored.

        Returns:
            The new graph.
        """
        layers = (x if x.fixed is None else replace(x, fixed=bits[x.name]) for x in self.layers)
        return replace(self, layers=tuple(layers))

    def counted_on(self, other: LayerGraph) -> LayerGraph:
        """Return the same layers with the counts of a graph that was traced on another input.

        Args:
            other: A graph of the same model.

        Returns:
            This graph with the input shape, MACs and activation counts of `other`.
        """
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
        """SHA-256 (hex) of the layers' names, kinds and shapes; a policy fits all models with the same digest."""
        rows = [[layer.name, layer.kind, list(layer.weight_shape)] for layer in sorted(self.layers, key=_name)]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Convert the graph to JSON values.

        Returns:
            {field: value}.
        """
        out = asdict(self)
        for row, layer in zip(out["layers"], self.layers, strict=True):
            row["fixed"] = str(layer.fixed) if layer.fixed else None
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerGraph:
        """Rebuild a graph from the result of `to_dict`.

        Args:
            data: The JSON values.

        Returns:
            The graph.
        """

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
    """Select names by a name or a glob pattern.

    Args:
        names: All names.
        pattern: A name, taken literally if `names` holds it (brackets included), else a glob pattern.

    Returns:
        The selected names.

    Example:
        >>> from hub_mpq.core import matching
        >>> matching(["conv1", "layer1.conv1", "layer1.conv2"], "layer1.*")
        ('layer1.conv1', 'layer1.conv2')
    """
    names = tuple(names)
    return (pattern,) if pattern in names else tuple(name for name in names if fnmatch.fnmatchcase(name, pattern))


def _name(layer: LayerSpec) -> str:
    return layer.name


def _prefixes(name: str) -> list[str]:
    """The names of the modules that contain a layer, outermost first, and its own name."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
