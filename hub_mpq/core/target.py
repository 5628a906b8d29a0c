"""What a policy is made for: the menu of a program that others run, and the registry of all targets."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, TypeVar

from ..errors import InvalidArgument
from .bits import FLOAT_BITS, Candidates, LayerBits
from .layer import LayerGraph, LayerSpec
from .registry import Registry
from .result import Policy


class Target(ABC):
    """A program, or a file format, that a policy is made for. Weights alone are quantized for it.

    A target that restricts nothing but widths needs `name` and `menu`.

    Attributes:
        name: Name of the target, as `target=` and `--target`.
        tied: Layers of one module that read one input (q, k, v; gate, up) are computed as one matrix, so their weights
            take one choice.
        own_size: What the file of the target is called in usage and reports, where its bytes are others than those of
            the packed file; a `size` limit then counts these. "": the packed file counts.
    """

    name: str
    tied: ClassVar[bool] = False
    own_size: ClassVar[str] = ""

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """All that a layer's weight may become, ascending; () where it has to stay float."""
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
        there is; of that width groups and zero points as asked, or else the first of the menu.

        Raises:
            InvalidArgument: The layer has to stay float.
        """
        choices = self.checked_menu(layer)
        if bits.of_weight in choices:
            return bits.of_weight
        width = next((b.weight for b in choices if b.weight >= bits.weight), choices[-1].weight)
        alike = [b for b in choices if b.weight == width]
        asked = [b for b in alike if b.group_size == bits.group_size] or alike
        return next((b for b in asked if b.symmetric == bits.symmetric), asked[0])

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
        menu = self.checked_menu(layer)
        found = [b for b in menu if (b in asked.menu if asked.menu else all_widths or b.weight in asked.weight)]
        if not found:
            raise InvalidArgument(
                f"target {self.name!r}: layer {layer.name!r} takes {_listed(menu)} bits, none of the candidates"
            )
        if asked.menu is None and (grouped := [b for b in found if b.group_size in asked.group_size]):
            zeros = {(b.weight, b.group_size) for b in grouped if not b.symmetric and not asked.symmetric}
            found = [b for b in grouped if b.symmetric != ((b.weight, b.group_size) in zeros)]
        return Candidates(activation=(FLOAT_BITS,), menu=tuple(found))

    def checked_menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """The menu of a layer; InvalidArgument, with the way out, where it has to stay float."""
        menu = self.menu(layer)
        if not menu:
            raise InvalidArgument(
                f"target {self.name!r} has no quantized form for layer {layer.name!r} ({layer.kind}, "
                f"{list(layer.weight_shape)}): leave it float with exclude=[{layer.name!r}]"
            )
        return menu

    def check(self, graph: LayerGraph, policy: Policy) -> None:
        """Raise InvalidArgument, naming a layer, for a policy that the target cannot run."""
        tied: dict[str, tuple[str, LayerBits]] = {}
        for layer in graph:
            bits = policy.bits[layer.name]
            if bits.activation != FLOAT_BITS:
                raise InvalidArgument(f"target {self.name!r} quantizes weights alone; layer {layer.name!r} is {bits}")
            if bits.weight != FLOAT_BITS and bits not in self.menu(layer):
                raise InvalidArgument(f"target {self.name!r} has no form of layer {layer.name!r} at {bits}")
            if self.tied and layer.activation_tie is not None:
                first, same = tied.setdefault(layer.activation_tie, (layer.name, bits))
                if same != bits:
                    raise InvalidArgument(
                        f"target {self.name!r} computes {first!r} and {layer.name!r} as one matrix: they are at {same} "
                        f"and {bits}"
                    )


targets: Registry[Target] = Registry("target", "hub_mpq.export")
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
    return ", ".join(map(str, sorted({b.weight for b in menu})))
