"""One BatchNorm bank per width: parameters and statistics, while the module itself stays (LIMPQ §3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

_BANKED = ("weight", "bias", "running_mean", "running_var")


class _Banked:
    """Mixed into a norm's own class: its four tensors are rows of [widths, channels] banks."""

    bank: int

    def _row(self, name: str) -> Tensor | None:
        table = getattr(self, f"{name}_bank", None)
        return None if table is None else table[self.bank]

    weight = property(lambda self: self._row("weight"))
    bias = property(lambda self: self._row("bias"))
    running_mean = property(lambda self: self._row("running_mean"))
    running_var = property(lambda self: self._row("running_var"))


def add_banks(model: nn.Module, names: Iterable[str], count: int) -> None:
    """Give each named BatchNorm `count` banks that start as copies of its tensors; in place.

    The class changes to a subclass of the module's own, so timm's BatchNormAct2d keeps its activation.
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
    """`forms[cls]`, which takes a norm's place, with banks when `cls` has them; None for any other class."""
    if cls in forms:
        return forms[cls]
    if cls.__bases__[0] is _Banked and cls.__bases__[1] in forms:
        return type(cls.__name__, (_Banked, forms[cls.__bases__[1]]), {})
    return None


def select_bank(model: nn.Module, name: str, index: int) -> None:
    """Make one bank of a norm the one in use."""
    model.get_submodule(name).bank = index
