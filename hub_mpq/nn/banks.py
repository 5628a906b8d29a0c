"""One BatchNorm bank of parameters and statistics per bit-width, in the same module, as in LIMPQ (§3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

_BANKED = ("weight", "bias", "running_mean", "running_var")


class _Banked:
    """Mixin for a norm's own class, whose four tensors become rows of [bit-widths, channels] banks."""

    bank: int

    def _row(self, name: str) -> Tensor | None:
        table = getattr(self, f"{name}_bank", None)
        return None if table is None else table[self.bank]

    weight = property(lambda self: self._row("weight"))
    bias = property(lambda self: self._row("bias"))
    running_mean = property(lambda self: self._row("running_mean"))
    running_var = property(lambda self: self._row("running_var"))


def add_banks(model: nn.Module, names: Iterable[str], count: int) -> None:
    """Give each named BatchNorm `count` banks, initialized with copies of its tensors, in place.

    The class changes to a subclass of the module's own class, so timm's BatchNormAct2d keeps its activation.
    """
    for name in names:
        norm = model.get_submodule(name)
        own = {key: getattr(norm, key) for key in _BANKED}
        for key in _BANKED:
            norm._parameters.pop(key, None)
            norm._buffers.pop(key, None)
            norm.__dict__.pop(key, None)
        norm.__class__ = type(f"Banked{type(norm).__name__}", (_Banked, type(norm)), {})
        for key, value in own.items():
            if value is None:
                continue
            table = value.detach().clone().repeat(count, 1)
            if isinstance(value, nn.Parameter):
                norm.register_parameter(f"{key}_bank", nn.Parameter(table, requires_grad=value.requires_grad))
            else:
                norm.register_buffer(f"{key}_bank", table)
        norm.bank = 0


def rebased(cls: type, forms: Mapping[type, type]) -> type | None:
    """`forms[cls]`, which replaces a norm, with banks if `cls` has them; None for any other class."""
    if cls in forms:
        return forms[cls]
    if cls.__bases__[0] is _Banked and cls.__bases__[1] in forms:
        return type(cls.__name__, (_Banked, forms[cls.__bases__[1]]), {})
    return None


def select_bank(model: nn.Module, name: str, index: int) -> None:
    """Select the bank of a norm to use."""
    model.get_submodule(name).bank = index
