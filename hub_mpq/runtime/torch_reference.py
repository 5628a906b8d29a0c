"""The reference: the fake-quantized network in torch, weights put on their grids once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.restore_state import copied_structure
from ..core import LayerBits, LayerSpec, Runtime, RuntimeLayers
from ..nn.packed import packed_layers, set_resident
from ..nn.quantize import quantized_layers
from .integer_layer import layer_form


class _OnGrid(nn.Module):
    """Stands in a layer's `weight_quantizer` when the weight is on its grid already."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


class Torch(Runtime):
    """Float arithmetic on the quantized grid, on any device: what every other runtime is compared with."""

    name = "torch"
    generates: ClassVar[bool] = True

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """Nothing: it computes in float."""
        return ()

    @torch.no_grad()
    def build(self, model: nn.Module, example: Any) -> tuple[nn.Module, RuntimeLayers]:
        net = copied_structure(model).eval()
        settled: dict[int, nn.Parameter] = {}  # layers that share a weight go on sharing it
        for _, module in quantized_layers(net):
            weight = module.weight
            if id(weight) not in settled:
                settled[id(weight)] = nn.Parameter(module.weight_quantizer(weight).detach(), requires_grad=False)
            module._parameters["weight"], module.weight_quantizer = settled[id(weight)], _OnGrid()
        if any(True for _ in packed_layers(net)):
            set_resident(net, "float")
        names = [name for name, module in net.named_modules() if layer_form(module) is not None]
        return net, RuntimeLayers(self.name, (), dict.fromkeys(names, "it is the reference"))

    def observe(self, module: nn.Module, batch: Any) -> Iterable[Any]:
        return ()
