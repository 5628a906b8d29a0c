"""BSQ: bit planes as parameters, a group lasso empties them, empty ones are dropped (Yang et al., ICLR 2021)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument
from ..quantizers import LSQ, activation_scale
from ..quantizers.bit_planes import BitPlanes
from ..spec import FLOAT_BITS, Candidates, LayerBits, LayerGraph
from ..train.hooks import Groups
from .install import install
from .scores import Scores
from .soft import SoftCosts
from .strategy import SearchStrategy, register_strategy


@register_strategy("bsq")
class BSQ(SearchStrategy):
    """Loss: task + strength · Σ_l (#Para_l·#Bit_l/#Para)·Σ_i sqrt(‖[p_i; n_i]‖² + 1e-8) [sure]. Weights only;
    activations keep `activation_bits` (None: the widest candidate that the budget affords to weights and inputs alike).

    planes: 7 and a sign are 8 bits. every: re-quantize each so many steps as well as after every epoch.
    Scores [ours]: the share of a layer's weight energy in the planes that a narrower width would cut at the bottom:
    Σ_i 4^i·‖[p_i; n_i]‖² over cut planes i, over the same sum over all planes. Without a budget the alive planes and
    the sign are the width.
    """

    many_processes = False  # parameters are rebuilt

    def __init__(
        self,
        *,
        strength: float = 5e-3,
        planes: int = 7,
        every: int | None = None,
        activation_bits: int | None = None,
        plane_lr: float = 1e-2,
    ) -> None:
        if not 1 <= planes <= 7:
            raise InvalidArgument(f"planes are 1 to 7 (the sign is the eighth bit), not {planes}")
        self.strength, self.planes, self.every = strength, planes, every
        self.activation_bits, self.plane_lr = activation_bits, plane_lr

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        self.graph, self.candidates = graph, candidates
        widths = {b for c in candidates.values() for b in c.activation}
        wanted = (
            SoftCosts(graph, self.limits).affordable(widths) if self.activation_bits is None else self.activation_bits
        )
        self.activation = {n: min(c.activation, key=lambda b: (abs(b - wanted), b)) for n, c in candidates.items()}

        def make(layer: Any, module: nn.Module) -> tuple[nn.Module, nn.Module]:
            weight = BitPlanes(module.weight, self.planes)  # type: ignore[arg-type]
            device = next(module.parameters()).device
            return weight.to(device), LSQ((self.activation[layer.name],), signed=False).to(device)

        self.layers = install(model, graph, make)
        self.tensors = {n: m.weight_quantizer for n, m in self.layers.items() if graph[n].weight_owner is None}
        for module in self.layers.values():  # the planes are the weight
            module.weight.requires_grad_(False)
        self.count = sum(graph[n].weight_count for n in self.tensors)

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            if layer.input_quantizer is not None and name in inputs:
                bits = self.activation[name]
                layer.input_quantizer.init(bits, *activation_scale(inputs[name], bits, mse=True))

    def own_groups(self) -> list[dict[str, Any]]:
        params = [m.planes for m in self.tensors.values()]
        return [{"name": "planes", "params": params, "lr": self.plane_lr, "weight_decay": 0.0}]

    def penalty(self) -> Tensor:
        """Σ_l (#Para_l·#Bit_l/#Para) · Σ_i of the planes' norms."""
        rows = [self.graph[n].weight_count * m.bits / self.count * m.norms().sum() for n, m in self.tensors.items()]
        return torch.stack(rows).sum()

    def losses(self, model: nn.Module, batch: Any, rng: random.Random) -> Iterator[tuple[Tensor, Groups]]:
        yield self.loss.loss(model, batch) + self.strength * self.penalty(), None

    def after_step(self, model: nn.Module, step: int) -> None:
        for tensor in self.tensors.values():
            tensor.clip()
        if self.every and (step + 1) % self.every == 0:
            self.requantize()

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        self.requantize()
        return True  # planes are exact bits again: the optimizer's memory is of others

    def requantize(self) -> None:
        """Exact planes, empty ones dropped; no layer's function changes."""
        for tensor in self.tensors.values():
            tensor.requantize()

    def _owner(self, name: str) -> BitPlanes:
        out: BitPlanes = self.layers[name].weight_quantizer
        return out

    def inferred(self, model: nn.Module) -> dict[str, LayerBits]:
        out = {}
        for layer in self.graph.searched:
            widths, bits = self.candidates[layer.name].weight, self._owner(layer.name).bits
            width = next((b for b in widths if b >= bits), widths[-1])
            out[layer.name] = LayerBits(width, FLOAT_BITS if layer.weight_only else self.activation[layer.name])
        return out

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        self.requantize()
        out: dict[str, dict[LayerBits, float]] = {}
        for layer in self.graph.searched:
            tensor = self._owner(layer.name)
            activation = FLOAT_BITS if layer.weight_only else self.activation[layer.name]
            energy = (4.0 ** torch.arange(tensor.planes.shape[1])).double() * tensor.norms().cpu().double().square()
            high, whole = tensor.span[1], float(energy.sum()) or 1.0
            out[layer.name] = {
                # width w keeps the sign and the w − 1 uppermost alive planes
                LayerBits(w, activation): float(energy[: max(high - max(w - 1, 0), 0)].sum()) / whole
                for w in self.candidates[layer.name].weight
            }
        return out

    def details(self, model: nn.Module) -> dict[str, Any]:
        return {"alive_bits": {name: tensor.bits for name, tensor in self.tensors.items()}, "penalty": self.strength}
