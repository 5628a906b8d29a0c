"""The interface of a target (a program or file format that policies are made for), and the registry of targets."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from ..errors import InvalidArgument
from .bits import FLOAT_BITS, Candidates, LayerBits, nearest
from .layer import LayerGraph, LayerSpec
from .registry import Registry
from .result import Policy

_FLOAT = LayerBits(FLOAT_BITS, FLOAT_BITS)


class Target(ABC):
    """A program or file format that a policy is made for.

    A target that only restricts bit-widths needs `name` and `menu`.

    Attributes:
        name: Name of the target, as in `target=` and `--target`.
        weight_only: Whether only weights are quantized.
        tied: Whether layers of one module that read one input (q, k, v; gate, up) are computed as one matrix and so
            must have the same bit-widths.
        own_size: Name of the target's file in usage and reports, if its size differs from that of the packed file; a
            `size` limit then counts its bytes. "" if the packed file counts.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import LayerBits, targets
        >>> layer = load("test_vit", meta=True).graph["blocks.0.mlp.fc1"]
        >>> str(targets.get("onednn").level(layer, LayerBits(8, 8)))
        'W7A8'
    """

    name: str
    weight_only: ClassVar[bool] = True
    tied: ClassVar[bool] = False
    own_size: ClassVar[str] = ""

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """Return everything that a layer may become.

        Args:
            layer: The layer.

        Returns:
            The bit-widths, ascending; () if the layer must stay float. Inputs are float (32 bits) in layers whose
            weight only is quantized.
        """
        raise NotImplementedError

    def nbytes(self, layer: LayerSpec, bits: LayerBits) -> int:
        """Return the bytes of a layer in the target's file; needed by targets with `own_size`.

        Args:
            layer: The layer; one that shares another layer's weight takes none.
            bits: Its bit-widths, from its menu.

        Returns:
            The bytes.
        """
        raise NotImplementedError

    def beside_nbytes(self, model: Any, graph: LayerGraph) -> int | None:
        """Return the bytes of the target's file without the layers, equal for all policies; needed with `own_size`.

        Args:
            model: The network (an `nn.Module`), float or quantized, possibly on the meta device.
            graph: Its layers.

        Returns:
            The bytes; None if they are not known, in which case `size` cannot be limited.
        """
        raise NotImplementedError

    def notes(self, graph: LayerGraph) -> tuple[str, ...]:
        """Return what a user of the target should know about a model.

        Args:
            graph: The model's layers.

        Returns:
            The notes, one sentence each.
        """
        return ()

    def level(self, layer: LayerSpec, bits: LayerBits) -> LayerBits:
        """Return the choice from a layer's menu that a level such as "W4" stands for.

        It is the level itself if the menu has it; else the narrowest bit-width that is not narrower, or the widest one;
        at that bit-width, the requested group size and zero points, or else the first entry of the menu. If a pair of
        bit-widths is missing, the weight is narrowed: W8A8 becomes W7A8. Our construction.

        Args:
            layer: The layer.
            bits: The level.

        Returns:
            The choice.

        Raises:
            InvalidArgument: The layer must stay float.
        """
        alone = self.weight_only or layer.weight_only
        return nearest(self.checked_menu(layer), bits.of_weight if alone else bits)

    def levels(self, graph: LayerGraph, bits: Mapping[str, LayerBits]) -> dict[str, LayerBits]:
        """Apply `level` to several layers.

        Args:
            graph: The model's layers.
            bits: {layer: level}.

        Returns:
            {layer: choice}; an embedding that shares its weight takes the bit-width of the other layer.
        """
        return graph.with_shared_weights({name: self.level(graph[name], b) for name, b in bits.items()})

    def candidates(self, layer: LayerSpec, asked: Candidates, *, all_widths: bool = False) -> Candidates:
        """Restrict the requested candidates of a layer to its menu.

        If the menu has none of the requested group sizes (for example because none was requested and all types of the
        target have groups), all of its group sizes are candidates. Requested zero points are dropped where the menu has
        none.

        Args:
            layer: The layer.
            asked: The requested candidates.
            all_widths: Whether no bit-widths were requested; the whole menu is then used.

        Returns:
            The candidates.

        Raises:
            InvalidArgument: The layer must stay float, or the menu has none of the bit-widths.
        """
        menu, alone = self.checked_menu(layer), self.weight_only or layer.weight_only
        inputs = (FLOAT_BITS,) if alone else asked.activation
        named = asked.weights if alone else asked.pairs
        widths = [b for b in menu if b.weight in asked.weight and b.activation in inputs]
        found = [b for b in menu if b in named] if asked.menu else list(menu) if all_widths else widths
        if not found:
            raise InvalidArgument(
                f"target {self.name!r} supports none of the candidates of layer {layer.name!r}; "
                f"choose from {_listed(menu)}"
            )
        if asked.menu is None and (grouped := [b for b in found if b.group_size in asked.group_size]):
            zeros = {(b.weight, b.group_size) for b in grouped if not b.symmetric and not asked.symmetric}
            found = [b for b in grouped if b.symmetric != ((b.weight, b.group_size) in zeros)]
        return Candidates(activation=(FLOAT_BITS,) if self.weight_only else asked.activation, menu=tuple(found))

    def checked_menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """Return the menu of a layer that must not be empty.

        Args:
            layer: The layer.

        Returns:
            The menu.

        Raises:
            InvalidArgument: The layer must stay float; the error names the option that excludes it.
        """
        menu = self.menu(layer)
        if not menu:
            raise InvalidArgument(
                f"target {self.name!r} has no quantized form for layer {layer.name!r} ({layer.kind}, "
                f"{list(layer.weight_shape)}); keep it float with exclude=[{layer.name!r}]"
            )
        return menu

    def check_layer(self, layer: LayerSpec, bits: LayerBits) -> None:
        """Check that the target can run a layer at its bit-widths.

        Args:
            layer: The layer.
            bits: Its bit-widths.

        Raises:
            InvalidArgument: It cannot; the error names the nearest choice.
        """
        menu = self.menu(layer)
        if bits not in (*menu, _FLOAT):
            instead = f"; the nearest choice is {nearest(menu, bits)}" if menu else ""
            raise InvalidArgument(f"target {self.name!r} does not support layer {layer.name!r} at {bits}{instead}")

    def check(self, graph: LayerGraph, policy: Policy) -> None:
        """Check that the target can run a policy.

        Args:
            graph: The model's layers.
            policy: The policy.

        Raises:
            InvalidArgument: It cannot; the error names a layer.
        """
        tied: dict[str, tuple[str, LayerBits]] = {}
        for layer in graph:
            bits = policy.bits[layer.name]
            if self.weight_only and bits.activation != FLOAT_BITS:
                raise InvalidArgument(
                    f"target {self.name!r} quantizes weights only, but layer {layer.name!r} is at {bits}"
                )
            self.check_layer(layer, bits)
            if self.tied and layer.activation_tie is not None:
                first, same = tied.setdefault(layer.activation_tie, (layer.name, bits))
                if same != bits:
                    raise InvalidArgument(
                        f"target {self.name!r} computes {first!r} and {layer.name!r} as one matrix, so their "
                        f"bit-widths must be equal, got {same} and {bits}"
                    )


targets: Registry[Target] = Registry("target", "hub_mpq.runtime")
"""All targets."""

T = TypeVar("T", bound=Target)


def register_target(target: T) -> T:
    """Register a target.

    Args:
        target: The target; its name must be new.

    Returns:
        The same target.

    Raises:
        InvalidArgument: The name is not valid, or another target has it.

    Example:
        >>> from hub_mpq import LayerBits, Target, register_target
        >>> class Eight(Target):
        ...     name = "eight"
        ...
        ...     def menu(self, layer):
        ...         return (LayerBits(8, 32),)
        >>> target = register_target(Eight())
    """
    targets.register(getattr(target, "name", ""), target)
    return target


def _listed(menu: tuple[LayerBits, ...]) -> str:
    if all(b.activation == FLOAT_BITS for b in menu):
        return f"{', '.join(map(str, sorted({b.weight for b in menu})))} bits"
    missing = {(w, a) for w in range(1, 9) for a in range(1, 9)} - {(b.weight, b.activation) for b in menu}
    return "1 to 8 bits" + (f" (except {', '.join(f'W{w}A{a}' for w, a in sorted(missing))})" if missing else "")
