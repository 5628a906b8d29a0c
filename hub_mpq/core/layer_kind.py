"""Kinds of layers: what the package needs to know to quantize, pack and trace layers of a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import InvalidArgument
from .registry import Registry


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer with a single weight, such as "linear".

    Args:
        name: The name used by `LayerSpec.kind` and in packed files.
        channel_axis: Axis of the weight with one scale per index: the output channels, or the rows of an embedding.
        row_axes: (row axis, column axis) of a weight that is packed row by row, each row starting at a new 32-bit word;
            the row axis is `channel_axis`. (0, 1) or (1, 0) for a matrix; (-2, -1) or (-1, -2) for a stack of matrices,
            whose rows are packed matrix by matrix. None packs the whole weight as one stream, channel by channel: in
            memory order if `channel_axis` is 0, else with axis 1 moved to the front.
        types: Qualified names of the float module types, such as "torch.nn.modules.linear.Linear". A module is of this
            kind if its exact type is one of them; subclasses are not.
        quantized: Class of the layer with quantizers, see `hub_mpq.nn.layers`: the class, or "module:Class" to import
            it on first use.
        packed: Class of the layer that keeps its weight packed, see `hub_mpq.nn.packed`; given like `quantized`.
        reads_indices: True for layers that look up rows of the weight: their input has no bit-width, and they do no
            multiplications.
        weight_only: True for layers that multiply a float input, which has no bit-width either.
        shares_input: True if layers of one parent that read the same tensor (q, k, v) must agree on its bit-width.
        macs: `macs(module, input, output)` returns the multiply-accumulates of one call for the whole batch; the
            tensors may be on the meta device. Needed only by kinds that multiply element by element; None counts the
            matrix products and convolutions that run.

    Raises:
        InvalidArgument: `row_axes` and `channel_axis` are not valid or do not fit together.

    Example:
        >>> from hub_mpq.core import layer_kinds
        >>> linear = layer_kinds.get("linear")
        >>> linear.channel_axis, linear.row_axes, linear.packed_class.__name__
        (0, (0, 1), 'PackedLinear')
    """

    name: str
    channel_axis: int
    row_axes: tuple[int, int] | None
    types: tuple[str, ...]
    quantized: type[Any] | str
    packed: type[Any] | str
    reads_indices: bool = False
    weight_only: bool = False
    shares_input: bool = False
    macs: Callable[[Any, Any, Any], int] | None = None

    def __post_init__(self) -> None:
        if self.row_axes not in (None, (0, 1), (1, 0), (-2, -1), (-1, -2)):
            raise InvalidArgument(f"row_axes must be (0, 1), (1, 0), (-2, -1), (-1, -2) or None, got {self.row_axes!r}")
        if self.channel_axis not in ((0, 1) if self.row_axes is None else self.row_axes[:1]):
            raise InvalidArgument(
                f"channel_axis must be the row axis, or 0 or 1 for a flat stream, got {self.channel_axis!r} "
                f"with row_axes={self.row_axes}"
            )

    @property
    def transposed(self) -> bool:
        """Whether the packed rows are columns of the weight."""
        return self.row_axes is not None and self.row_axes[0] > self.row_axes[1]

    @property
    def quantized_class(self) -> type[Any]:
        """The class of the layer with quantizers."""
        return _resolve(self.quantized)

    @property
    def packed_class(self) -> type[Any]:
        """The class of the layer that keeps its weight packed."""
        return _resolve(self.packed)


def _resolve(where: type[Any] | str) -> type[Any]:
    if not isinstance(where, str):
        return where
    module, _, name = where.partition(":")
    found: type[Any] = getattr(import_module(module), name)
    return found


layer_kinds: Registry[LayerKind] = Registry("layer kind", "hub_mpq.nn.kinds")
"""All kinds of layers, by name."""


def register_layer_kind(kind: LayerKind) -> LayerKind:
    """Let the package quantize, pack and trace layers of a new kind.

    Register a kind before models with such layers are traced, and before packed files with such layers are read.

    Args:
        kind: The kind; its name and its types must be new.

    Returns:
        The same kind.

    Raises:
        InvalidArgument: The name is not valid, or another kind has the name or one of the types.

    Example:
        >>> from hub_mpq import LayerKind, register_layer_kind
        >>> kind = register_layer_kind(
        ...     LayerKind(
        ...         name="my_linear",
        ...         channel_axis=0,
        ...         row_axes=(0, 1),
        ...         types=("my_package.MyLinear",),
        ...         quantized="my_package.quantized:QuantMyLinear",
        ...         packed="my_package.quantized:PackedMyLinear",
        ...     )
        ... )
    """
    for other in layer_kinds:
        if other.name != kind.name and (taken := sorted({*other.types} & {*kind.types})):
            raise InvalidArgument(f"type {taken[0]} already belongs to the layer kind {other.name!r}")
    return layer_kinds.register(kind.name, kind)
