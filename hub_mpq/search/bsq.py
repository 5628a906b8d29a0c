"""BSQ: bit planes are parameters, and planes that a group lasso empties are dropped (Yang et al., ICLR 2021)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Candidates, LayerBits, LayerGraph
from ..core.checks import number, whole
from ..core.layer_kind import layer_kinds
from ..cost.size import channel_count
from ..nn.quantize import quantize_layers
from ..quantizers import LSQ, activation_scale, weight_scale_mse
from ..quantizers.bit_planes import BitPlanes
from ..train.hooks import Groups
from .differentiable_costs import DifferentiableCosts
from .posttraining import noise
from .scores import Scores
from .strategy import SearchStrategy, additive, register_strategy
from .tied_layers import shared_widths, widest_of_ties


@register_strategy("bsq")
class BSQ(SearchStrategy):
    """Bit-level sparsity (BSQ), for the bit-widths of weights.

    The loss is task + strength · Σ_l (#Para_l·#Bit_l/#Para)·Σ_i sqrt(‖[p_i; n_i]‖² + 1e-8), as in the paper.
    Activations are trained at one bit-width.

    The scores are our construction: ‖Q(W) − W‖² / ‖W‖² of the weight W that the planes hold, rounded to a narrower
    bit-width with the scales that a policy starts from. Empty planes at the bottom cost nothing. Planes that are cut
    are rounded off, not lost: the energy of the planes themselves would be nearly all of a weight with a few large
    elements, at 2 bits as at 3.

    The paper has one activation bit-width only, the one used in training. Here every candidate is scored, so that every
    feasible budget can be met; each bit of difference from that bit-width counts more than all weights together, so it
    is given up only where the budget requires it. This is our construction, too.

    Without a budget, the bit-width of a layer is its number of remaining planes and the sign; layers that share a
    bit-width take the widest.

    Args:
        strength: Multiplier of the group lasso.
        planes: Number of bit planes at the start, without the sign: 7 for 8 bits.
        every: Steps between re-quantizations, in addition to the one after every epoch; None for none.
        activation_bits: Bit-width of activations in training, or the nearest candidate; None for the widest candidate
            that the budget affords to weights and inputs alike, ignoring custom costs.
        plane_lr: Learning rate of the planes.
    """

    unit = "squared error relative to the weight"
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
        self.strength, self.plane_lr = number("strength", strength), number("plane_lr", plane_lr)
        self.planes = whole("planes (the sign is one bit more)", planes, 1, 7)
        self.every = None if every is None else whole("every", every, 1)
        self.activation_bits = None if activation_bits is None else whole("activation_bits", activation_bits, 1, 8)

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        self.graph, self.candidates = graph, candidates
        wanted = self.activation_bits or DifferentiableCosts(graph, self.limits).affordable(
            {b for c in candidates.values() for b in c.activation}, candidates
        )
        self.activation: dict[str, int] = {}
        for names, widths in shared_widths(graph, candidates, inputs=True):
            self.activation |= dict.fromkeys(names, min(widths, key=lambda b: (abs(b - wanted), b)))

        def make(layer: Any, module: nn.Module) -> tuple[nn.Module, nn.Module]:
            weight = BitPlanes(module.weight, self.planes)  # type: ignore[arg-type]
            return weight, LSQ((self.activation[layer.name],), signed=False)

        self.layers = quantize_layers(model, graph, candidates, make)
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
        return True  # the planes are rebuilt, so the optimizer's state no longer fits

    def requantize(self) -> None:
        """Round the planes to exact bits and drop empty ones, without changing the function of any layer."""
        for tensor in self.tensors.values():
            tensor.requantize()

    def _owner(self, name: str) -> BitPlanes:
        out: BitPlanes = self.layers[name].weight_quantizer
        return out

    def inferred(self, model: nn.Module) -> dict[str, LayerBits]:
        """Return, for every layer, the narrowest candidate that holds its remaining planes and the sign."""
        # all planes, one more for a carry, and the sign would be nine bits
        found = {n: LayerBits(min(self._owner(n).bits, 8), self.activation[n]) for n in self.layers}
        return widest_of_ties(self.graph, found, self.candidates)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        self.requantize()
        departure = 1.0 + len(self.layers)  # a layer's weight scores at most 1
        weight: dict[str, dict[int, float]] = {}
        activation: dict[str, dict[int, float]] = {}
        for name in self.layers:
            c, kind = self.candidates[name], layer_kinds.get(self.graph[name].kind)
            w = self._owner(name)(self.layers[name].weight).float()
            channels, axis = channel_count(kind.name, w.shape), kind.channel_axis
            rounded = LSQ(c.weight, signed=True, channels=channels, axis=axis).to(w.device)
            for bits in c.weight:
                rounded.init(bits, weight_scale_mse(w, bits, axis=axis))
            power = float(w.double().square().sum()) or 1.0
            weight[name] = {b: float(e.double().square().sum()) / power for b, e in noise(rounded, w).items()}
            activation[name] = {a: departure * abs(a - self.activation[name]) for a in c.activation}
        return additive(self.graph, weight, activation)

    def details(self, model: nn.Module) -> dict[str, Any]:
        return {"alive_bits": {name: tensor.bits for name, tensor in self.tensors.items()}, "penalty": self.strength}
