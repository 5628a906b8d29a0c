"""Experts with separate bit-widths: the matrices of a stack as layers, each a stack of one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .experts import ExpertStack, Stack, stacks
from .fused import Product
from .joined import joined


class SplitStack(Stack):
    """A stack whose matrices are layers named by index, with weights [1, out, in] that are views of the stack's weight.
    While all of them are float, its state dict is that of the stack."""

    def __init__(self, stack: ExpertStack) -> None:
        super().__init__()
        self.transposed, weight = stack.transposed, stack.weight
        for i in range(len(weight)):
            part = nn.Parameter(weight.detach()[i : i + 1], requires_grad=weight.requires_grad)
            self.add_module(str(i), type(stack)(part))

    def forward(self, x: Tensor, expert: int, tokens: Tensor | None = None, count: int = 0) -> Tensor:
        layer = getattr(self, str(expert))
        if isinstance(layer, Tensor):  # concealed
            return Product(self.transposed).run(x, layer[0], None)
        out: Tensor = layer(x, 0, tokens, count)
        return out

    @property
    def is_float(self) -> bool:
        """Whether no matrix is quantized or packed."""
        return not self._parameters and all(isinstance(layer, ExpertStack) for layer in self.children())

    def whole(self) -> Tensor:
        """The whole stack: a view if the matrices are still adjacent in memory, else a copy."""
        parts: list[Tensor] = [layer.weight for layer in self.children()]  # type: ignore[misc]
        return joined(parts)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if destination is None or not self.is_float:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        destination[prefix.removesuffix(".")] = self.whole() if keep_vars else self.whole().detach()
        return destination

    def conceal(self) -> nn.Parameter | None:
        if self.is_float:
            return nn.Parameter(self.whole().detach(), requires_grad=next(self.parameters()).requires_grad)
        for name, layer in list(self.named_children()):
            if isinstance(layer, ExpertStack):
                delattr(self, name)
                self.register_parameter(name, layer.weight)
        return None

    def to_layers(self, state: dict[str, Tensor], name: str) -> None:
        if name in state:
            state.update({f"{name}.{i}": part for i, part in enumerate(state.pop(name).split(1))})
        for i, layer in self.named_children():
            if isinstance(layer, Stack):
                layer.to_layers(state, f"{name}.{i}")

    def to_parameter(self, state: dict[str, Tensor], name: str) -> None:
        parts = [f"{name}.{i}" for i in range(len(self._modules) + len(self._parameters))]
        for part in parts:
            super().to_parameter(state, part)
        if all(part in state for part in parts):
            state[name] = torch.cat([state.pop(part) for part in parts])


def split_experts(model: nn.Module, names: Collection[str] | None = None) -> bool:
    """Split stacks that `expose_experts` has turned into layers into one layer per matrix, in place.

    Args:
        model: The model.
        names: Names of the stacks; None for all.

    Returns:
        Whether it has such layers now.
    """
    found = False
    for parent, name, stack in stacks(model):
        if isinstance(stack, ExpertStack) and (names is None or f"{parent}.{name}".lstrip(".") in names):
            setattr(model.get_submodule(parent), name, SplitStack(stack))
        found |= isinstance(getattr(model.get_submodule(parent), name), SplitStack)
    return found


def stack_and_expert(model: nn.Module, layer: str) -> tuple[str, int] | None:
    """(name of the stack, index) of a layer that is one expert's matrix; None for any other layer."""
    stack, _, expert = layer.rpartition(".")
    return (stack, int(expert)) if isinstance(model.get_submodule(stack), SplitStack) else None


def split_stacks(layers: Iterable[str]) -> set[str]:
    """Names of the stacks that must be split to have layers of these names, if they are stacks."""
    return {stack for stack, _, expert in (name.rpartition(".") for name in layers) if expert.isdecimal()}
