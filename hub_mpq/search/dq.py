"""DQ as a strategy: widths follow from learned steps and ranges, under a soft budget (Uhlich et al., ICLR 2020)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import FLOAT_BITS, Candidates, LayerBits, LayerGraph, Limit, limits, parse_bytes
from ..core.checks import number, whole
from ..errors import InvalidArgument
from ..nn.quantize import quantize_layers
from ..quantizers import activation_scale, weight_range, weight_scale_mse
from ..quantizers.dq import DQ
from ..train.hooks import Groups
from .differentiable_costs import DifferentiableCosts
from .scores import Scores
from .strategy import SearchStrategy, additive, register_strategy
from .tied_layers import shared_widths, widest_of_ties


@register_strategy("dq")
class DQSearch(SearchStrategy):
    """Loss: task + strength·Σ relu(S/S0 − 1)² over the constraints [sure; relative S: ours], gradients of (d, qmax)
    clipped to [−d, d], then projected. SGD with one learning rate for everything, as the paper's claim has it.

    parametrization: "step-range" (the paper's), "bits-step", "bits-range". grid: "uniform" or "power-of-two".
    weight_bytes, activation_bytes: constraints on the searched layers, bytes or "70KB"; activation: "max" (the
    largest layer) or "sum". Without them, the budget searched for is the constraint. They are soft: they steer the
    training, the solver holds the budget alone, and widths inferred beyond them come with a warning. Search needs no
    budget: the inferred widths are a policy. start: width to start from; None: the widest level within the constraint,
    so that a short run spends its steps on the trade between layers and not on the way there; on the power-of-two grid
    at most 4 bits, whose least codes are next to nothing already [ours].
    Scores [ours]: noise falls as 4^−b, and the noise that a layer has at its learned (real) width β is taken to hurt as
    much as any other layer's at its own: 4^(β−b) at width b.
    """

    unit = "noise relative to that at the learned width"
    optimizer = "sgd"
    lr = scale_lr = 1e-2

    def __init__(
        self,
        *,
        parametrization: str = "step-range",
        grid: str = "uniform",
        power_of_two_step: bool = False,
        weight_bytes: str | float | None = None,
        activation_bytes: str | float | None = None,
        activation: str = "max",
        strength: float = 1.0,
        start: int | None = None,
    ) -> None:
        DQ(signed=True, bounds=(2, 8), parametrization=parametrization, grid=grid)  # refuse bad words at once
        if activation not in ("max", "sum"):
            raise InvalidArgument(f"activation is max or sum, not {activation!r}")
        if not isinstance(power_of_two_step, bool):
            raise InvalidArgument(f"power_of_two_step is true or false, not {power_of_two_step!r}")
        self.kind = {"parametrization": parametrization, "grid": grid, "power_of_two_step": power_of_two_step}
        self.strength = number("strength", strength)
        self.start = None if start is None else whole("start", start, 1, 8)
        self.constraints: dict[str, tuple[Limit, float]] = {}
        if weight_bytes is not None:
            cap = 8 * parse_bytes(weight_bytes, "weight_bytes")
            self.constraints["weight_bits"] = (limits.get("weight_bits"), cap)
        if activation_bytes is not None:
            name = "activation_peak" if activation == "max" else "activation_memory"
            self.constraints[name] = (limits.get(name), parse_bytes(activation_bytes, "activation_bytes"))

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        self.graph, self.candidates = graph, candidates
        for inputs in (False, True):  # before the training, not after it
            list(shared_widths(graph, candidates, inputs=inputs))
        if self.constraints and self.limits:
            warnings.warn(
                "weight_bytes and activation_bytes only steer DQ's training, the policy is held to the budget alone: "
                "put size=, activation_memory= or activation_peak= beside it for limits that hold",
                stacklevel=2,
            )

        def make(layer: Any, module: nn.Module) -> tuple[nn.Module, nn.Module]:
            c = candidates[layer.name]
            weight = DQ(signed=True, bounds=(c.weight[0], c.weight[-1]), **self.kind)  # type: ignore[arg-type]
            inputs = DQ(signed=False, bounds=(c.activation[0], c.activation[-1]), **self.kind)  # type: ignore[arg-type]
            return weight, inputs

        self.layers = quantize_layers(model, graph, candidates, make)
        self.quantizers = list({id(m): m for m in model.modules() if isinstance(m, DQ)}.values())
        self.costs = DifferentiableCosts(graph, self.constraints or self.limits)
        self.affordable = self.costs.affordable(range(1, 9), candidates)

    @torch.no_grad()
    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        """Start at one width everywhere, the range of least squared error."""
        for name, layer in self.layers.items():
            q = layer.weight_quantizer
            bits = self._start(q)
            codes = max(2 ** (min(bits, 8) - 1) - 1, 1)
            top = weight_scale_mse(layer.weight, min(bits, 8), axis=None)[0] * codes
            q.init(bits, top if bool(layer.weight.any()) else weight_range(layer.weight))
            q = layer.input_quantizer
            if q is None:
                continue
            x = inputs[name] if name in inputs else torch.ones(1)
            q.signed = bool((x < 0).any())
            q.bounds = (max(q.bounds[0], 1 + q.signed), max(q.bounds[1], 1 + q.signed))
            bits = self._start(q)
            scale, _ = activation_scale(x.abs(), bits - q.signed, mse=True)
            q.init(bits, scale[0] * (2 ** (bits - q.signed) - 1))
            q.project()

    def _start(self, q: DQ) -> int:
        low, high = q.bounds
        if self.start is not None:
            return min(max(self.start, low), high)
        wanted = self.affordable if q.grid == "uniform" else min(self.affordable, 4)
        return min(max(wanted, low), high)

    def own_groups(self) -> list[dict[str, Any]]:
        params = [p for q in self.quantizers for p in q.parameters()]
        return [{"name": "quantizers", "params": params, "lr": self.scale_lr, "weight_decay": 0.0}]

    def widths(self, *, real: bool = False) -> dict[str, tuple[Tensor, Tensor | None]]:
        """{layer: (weight, activation) bits}, differentiable; real: before they are rounded up."""

        def of(q: DQ) -> Tensor:
            return q.real_width() if real else q.width()

        return {
            name: (of(m.weight_quantizer), of(m.input_quantizer) if m.input_quantizer is not None else None)
            for name, m in self.layers.items()
        }

    def losses(self, model: nn.Module, batch: Any, rng: random.Random) -> Iterator[tuple[Tensor, Groups]]:
        loss = self.loss.loss(model, batch)
        yield loss + self.strength * self.costs.over(self.widths(), 2).to(loss.device), None

    def before_step(self, model: nn.Module, step: int) -> None:
        for q in self.quantizers:
            q.clip_gradients()

    def after_step(self, model: nn.Module, step: int) -> None:
        for q in self.quantizers:
            q.project()

    def inferred(self, model: nn.Module) -> dict[str, LayerBits]:
        """Every layer's learned width; of layers that share widths (ties), the widest. Warns of a constraint that the
        widths are over, where no budget is going to decide."""
        found = self._found()
        if self.limits:
            return found
        widths = {}
        for layer in self.graph.searched:
            weight, inputs = (torch.tensor(float(b)) for b in (found[layer.name].weight, found[layer.name].activation))
            widths[layer.name] = (weight, None if layer.weight_only else inputs)
        for name, ratio in self.costs.ratios(widths).items():
            if ratio > 1 + 1e-6:
                asked, unit = ("weight_bytes", 8) if name == "weight_bits" else ("activation_bytes", 1)
                cap = self.constraints[name][1] / unit
                warnings.warn(
                    f"the widths that DQ settled on take {float(ratio) * cap:.0f} bytes of {asked}={cap:g}, which is a "
                    "soft constraint: search longer or with more strength, or name a budget, which is met exactly",
                    stacklevel=2,
                )
        return found

    def _found(self) -> dict[str, LayerBits]:
        with torch.no_grad():
            found = {
                n: LayerBits(round(float(w)), FLOAT_BITS if a is None else round(float(a)))
                for n, (w, a) in self.widths().items()
            }
        return widest_of_ties(self.graph, found, self.candidates)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        learned = self.widths(real=True)
        weight = {n: {b: 4.0 ** (float(w) - b) for b in self.candidates[n].weight} for n, (w, _) in learned.items()}
        activation = {
            n: {b: 4.0 ** (float(a) - b) for b in self.candidates[n].activation}
            for n, (_, a) in learned.items()
            if a is not None
        }
        return additive(self.graph, weight, activation)

    def details(self, model: nn.Module) -> dict[str, Any]:
        with torch.no_grad():
            reached = {name: float(x) for name, x in self.costs.ratios(self.widths()).items()}
        return {**self.kind, "reached": reached}
