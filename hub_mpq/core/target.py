"""What a policy is made for: the menu of a program that others run, and the registry of all targets."""

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
    """A program, or a file format, that a policy is made for.

    A target that restricts nothing but widths needs `name` and `menu`.

    Attributes:
        name: Name of the target, as `target=` and `--target`.
        weight_only: Weights alone are quantized for it.
        tied: Layers of one module that read one input (q, k, v; gate, up) are computed as one matrix, so their weights
            take one choice.
        own_size: What the file of the target is called in usage and reports, where its bytes are others than those of
            the packed file; a `size` limit then counts these. "": the packed file counts.
    """

    name: str
    weight_only: ClassVar[bool] = True
    tied: ClassVar[bool] = False
    own_size: ClassVar[str] = ""

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """All that a layer may become, ascending; () where it has to stay float. Inputs are float (32 bits) in layers
        whose weight alone is quantized."""
        raise NotImplementedError

    def nbytes(self, layer: LayerSpec, bits: LayerBits) -> int:
        """Bytes that a layer takes in the target's file, of a target with `own_size`.

        Args:
            layer: The layer; one whose weight another layer owns takes none.
            bits: One of its menu.
        """
        raise NotImplementedError

    def beside_nbytes(self, model: Any, graph: LayerGraph) -> int | None:
        """Bytes of the target's file beside the layers, the same at every policy, of a target with `own_size`.

        Args:
            model: The network (an nn.Module), float or quantized, perhaps on the meta device.
            graph: Its layers.

        Returns:
            The bytes; None where they are not known, and `size` can be no limit.
        """
        raise NotImplementedError

    def notes(self, graph: LayerGraph) -> tuple[str, ...]:
        """What a user of the target should know about a model, one sentence each."""
        return ()

    def level(self, layer: LayerSpec, bits: LayerBits) -> LayerBits:
        """The choice that a level such as "W4" stands for in a layer [our construction].

        It is the level itself where the menu has it. Else the narrowest width that is not narrower, or the widest
        there is; of that width groups and zero points as asked, or else the first of the menu. Where a pair of widths
        is missing, the weight is the narrower one: W7A8 stands for W8A8.

        Raises:
            InvalidArgument: The layer has to stay float.
        """
        alone = self.weight_only or layer.weight_only
        return nearest(self.checked_menu(layer), bits.of_weight if alone else bits)

    def levels(self, graph: LayerGraph, bits: Mapping[str, LayerBits]) -> dict[str, LayerBits]:
        """`level` in several layers by name; an embedding whose weight another layer shares takes that one's width."""
        return graph.with_shared_weights({name: self.level(graph[name], b) for name, b in bits.items()})

    def candidates(self, layer: LayerSpec, asked: Candidates, *, all_widths: bool = False) -> Candidates:
        """What a layer may choose from: what was asked for, as far as the menu has it.

        Where the menu has none of the group sizes, as where none was asked for of a target whose types all have groups,
        all of its own serve. Zero points that were asked for are left out where it has none.

        Args:
            layer: The layer.
            asked: Candidates of the user.
            all_widths: No widths were asked for: take all of the menu.

        Raises:
            InvalidArgument: The layer has to stay float, or the menu has none of the widths.
        """
        menu, alone = self.checked_menu(layer), self.weight_only or layer.weight_only
        inputs = (FLOAT_BITS,) if alone else asked.activation
        named = asked.weights if alone else asked.pairs
        widths = [b for b in menu if b.weight in asked.weight and b.activation in inputs]
        found = [b for b in menu if b in named] if asked.menu else list(menu) if all_widths else widths
        if not found:
            raise InvalidArgument(
                f"target {self.name!r}: layer {layer.name!r} takes {_listed(menu)} bits, none of the candidates"
            )
        if asked.menu is None and (grouped := [b for b in found if b.group_size in asked.group_size]):
            zeros = {(b.weight, b.group_size) for b in grouped if not b.symmetric and not asked.symmetric}
            found = [b for b in grouped if b.symmetric != ((b.weight, b.group_size) in zeros)]
        return Candidates(activation=(FLOAT_BITS,) if self.weight_only else asked.activation, menu=tuple(found))

    def checked_menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """The menu of a layer; InvalidArgument, with the way out, where it has to stay float."""
        menu = self.menu(layer)
        if not menu:
            raise InvalidArgument(
                f"target {self.name!r} has no quantized form for layer {layer.name!r} ({layer.kind}, "
                f"{list(layer.weight_shape)}): leave it float with exclude=[{layer.name!r}]"
            )
        return menu

    def check_layer(self, layer: LayerSpec, bits: LayerBits) -> None:
        """Raise InvalidArgument, naming the nearest choice, for widths of a layer that the target cannot run."""
        menu = self.menu(layer)
        if bits not in (*menu, _FLOAT):
            instead = f"; the nearest is {nearest(menu, bits)}" if menu else ""
            raise InvalidArgument(f"target {self.name!r} has no form of layer {layer.name!r} at {bits}{instead}")

    def check(self, graph: LayerGraph, policy: Policy) -> None:
        """Raise InvalidArgument, naming a layer, for a policy that the target cannot run."""
        tied: dict[str, tuple[str, LayerBits]] = {}
        for layer in graph:
            bits = policy.bits[layer.name]
            if self.weight_only and bits.activation != FLOAT_BITS:
                raise InvalidArgument(f"target {self.name!r} quantizes weights alone; layer {layer.name!r} is {bits}")
            self.check_layer(layer, bits)
            if self.tied and layer.activation_tie is not None:
                first, same = tied.setdefault(layer.activation_tie, (layer.name, bits))
                if same != bits:
                    raise InvalidArgument(
                        f"target {self.name!r} computes {first!r} and {layer.name!r} as one matrix: they are at {same} "
                        f"and {bits}"
                    )


targets: Registry[Target] = Registry("target", "hub_mpq.runtime")
"""All targets."""

T = TypeVar("T", bound=Target)


def register_target(target: T) -> T:
    """Make a target known by its name, and return it.

    Raises:
        InvalidArgument: The name is not a word, or another target has it.

    Example:
        >>> class Eight(Target):
        ...     name = "eight"
        ...
        ...     def menu(self, layer):
        ...         return (LayerBits(8, 32),)
        >>> register_target(Eight())
    """
    targets.register(getattr(target, "name", ""), target)
    return target


def _listed(menu: tuple[LayerBits, ...]) -> str:
    if all(b.activation == FLOAT_BITS for b in menu):
        return ", ".join(map(str, sorted({b.weight for b in menu})))
    missing = {(w, a) for w in range(1, 9) for a in range(1, 9)} - {(b.weight, b.activation) for b in menu}
    return "1 to 8" + (f", but for {', '.join(f'W{w}A{a}' for w, a in sorted(missing))}," if missing else "")
