"""The reference: the fake-quantized network in torch, weights put on their grids once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from ..adapters.restore_state import copied_structure
from ..core import LayerBits, LayerSpec, Runtime, RuntimeLayers
from .integer_layer import layer_form
from .rebuilt import weights_on_grid


class Torch(Runtime):
    """Float arithmetic on the quantized grid, on any device: what every other runtime is compared with."""

    name = "torch"
    generates: ClassVar[bool] = True

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """Nothing: it computes in float."""
        return ()

    def build(self, model: nn.Module, example: Any) -> tuple[nn.Module, RuntimeLayers]:
        net = copied_structure(model).eval()
        weights_on_grid(net)
        names = [name for name, module in net.named_modules() if layer_form(module) is not None]
        return net, RuntimeLayers(self.name, (), dict.fromkeys(names, "it is the reference"))

    def observe(self, module: nn.Module, batch: Any) -> Iterable[Any]:
        return ()
