"""DQ: bit-widths follow from learned step sizes and ranges, under a soft budget (Uhlich et al., ICLR 2020)."""

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
    """Differentiable quantization (DQ), with learned step sizes and ranges.

    The loss is task + strength·Σ relu(S/S0 − 1)² over the constraints, as in the paper, except that the excess is
    relative, which is our construction. As in the paper, gradients of (d, qmax) are clipped to [−d, d], the parameters
    are then projected, and SGD has one learning rate for everything.

    Constraints are soft: they steer the training, while the solver meets the budget only. If inferred bit-widths exceed
    a constraint, a warning says so. A budget is not required: the inferred bit-widths are a policy.

    The scores are our construction. Noise falls as 4^−b, and the noise of each layer at its learned (real) bit-width β
    is assumed to be equally harmful, so the score at b bits is 4^(β−b).

    Args:
        parametrization: "step-range" (the paper's choice), "bits-step" or "bits-range".
        grid: "uniform" or "power-of-two".
        power_of_two_step: Whether step sizes are powers of two.
        weight_bytes: Constraint on the weights of the searched layers: bytes, or a string such as "70KB". Without
            constraints, the budget is the constraint.
        activation_bytes: Constraint on the activations of the searched layers, likewise.
        activation: "max" to constrain the largest activation, or "sum" for all of them.
        strength: Multiplier of the penalty.
        start: Initial bit-width, 1 to 8. None for the widest level within the constraint, so that a short run spends
            its steps on the trade-off between layers; on the power-of-two grid at most 4 bits, whose smallest codes are
            almost zero already. This default is our construction.
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
        DQ(signed=True, bounds=(2, 8), parametrization=parametrization, grid=grid)  # checks these arguments
        if activation not in ("max", "sum"):
            raise InvalidArgument(f"activation must be 'max' or 'sum', got {activation!r}")
        if not isinstance(power_of_two_step, bool):
            raise InvalidArgument(f"power_of_two_step must be a bool, got {power_of_two_step!r}")
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
        for inputs in (False, True):  # raises before the training
            list(shared_widths(graph, candidates, inputs=inputs))
        if self.constraints and self.limits:
            warnings.warn(
                "weight_bytes and activation_bytes only steer the training of DQ, and the policy meets the budget "
                "alone; for limits that must be met, add size=, activation_memory= or activation_peak= to the budget",
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
        """Start with one bit-width everywhere, and with ranges that minimize the squared error."""
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
        """Return differentiable `{layer: (weight bits, activation bits)}`; with `real`, before rounding up."""

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
        """Return the learned bit-width of every layer, the widest one of tied layers.

        Without a budget, which would decide, warn if these bit-widths exceed a constraint.
        """
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
                    f"the bit-widths learned by DQ take {float(ratio) * cap:.0f} bytes and exceed the soft constraint "
                    f"{asked}={cap:g}; train longer, increase strength, or pass a budget, which is always met",
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
