"""The reference: the fake-quantized network in torch, with weights rounded to their grids once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from ..adapters.restore_state import copied_structure
from ..core import LayerBits, LayerSpec, Runtime, RuntimeLayers
from .integer_layer import layer_form
from .rebuilt import weights_on_grid


class Torch(Runtime):
    """Float arithmetic on the quantized grid, on any device; the reference of all other runtimes."""

    name = "torch"
    generates: ClassVar[bool] = True

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """Empty: it computes in float."""
        return ()

    def build(self, model: nn.Module, example: Any) -> tuple[nn.Module, RuntimeLayers]:
        net = copied_structure(model).eval()
        weights_on_grid(net)
        names = [name for name, module in net.named_modules() if layer_form(module) is not None]
        return net, RuntimeLayers(self.name, (), dict.fromkeys(names, "the reference computes in float"))

    def observe(self, module: nn.Module, batch: Any) -> Iterable[Any]:
        return ()
