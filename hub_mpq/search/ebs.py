"""EBS: strengths of all bit-widths, learned together with shared meta weights (Li et al., 2020)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Candidates, LayerGraph
from ..core.checks import number
from ..errors import InvalidArgument
from ..nn.quantize import quantize_layers
from ..quantizers import activation_scale, weight_scale_mse
from ..quantizers.mixture import Mixture
from ..train.hooks import Groups
from .differentiable_costs import DifferentiableCosts
from .scores import Scores
from .strategy import SearchStrategy, additive, register_strategy
from .train_val_split import train_val_split

NETWORK = ("weights", "biases", "scales")
TIE = 1e-3
RMS = 0.1  # well below the clipping of the training loop, at 1


def falling(values: Sequence[float]) -> list[float]:
    """Return the nearest non-increasing sequence (isotonic regression by pooling neighbours)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            (b, n), (a, m) = pools.pop(), pools.pop()
            pools.append(((a * m + b * n) / (m + n), m + n))
    return [value for value, count in pools for _ in range(count)]


@register_strategy("ebs")
class EBS(SearchStrategy):
    """Efficient bit-width search (EBS), with differentiable mixtures of bit-widths.

    As in the paper, each layer has one weight and one convolution, whose operands are mixtures over bit-widths, and a
    hinge penalizes the expected cost.

    The following is our construction:

    - The hinge is relative to the limit.
    - Strengths are trained by SGD, on a gradient that is normalised over all layers together. In a short run, Adam
      moves all strengths by the same amount, which hides the differences between layers.
    - The scores are −log p without the push of the hinge, because the solver meets the budget, and a hinge that is
      always active would send every layer to its lowest bit-width. Without that push, a wider bit-width cannot be worse
      for the task: what contradicts this is noise and is pooled (isotonic regression). A term of 1e-3·4^−b decides
      where strengths are equal, so that no budget is left unused.
    - Labels are not smoothed by default. A trained network is more certain than smoothed labels, so narrow bit-widths,
      which make it less certain, would lower the loss.

    Args:
        update: "bilevel": weights are trained on the training half of each pair of batches, strengths on the held-out
            half. "mixed": weights by ∇L_train, strengths by ∇L_train + balance·∇L_val (He et al., 2020). "single": both
            on the same batch.
        gumbel: Whether mixtures are stochastic, with a temperature that is annealed to a tenth; else softmax.
        strength: Multiplier of relu(E[cost]/cap − 1).
        balance: Multiplier of the held-out loss, for "mixed".
        temperature: Initial temperature, above 0; the lower, the sharper the mixtures.
        strength_lr: Learning rate of the strengths.
    """

    unit = "negative log probability"
    many_processes = False  # strengths and weights learn in turn
    optimizer = "sgd"
    lr = scale_lr = 1e-2
    smoothing = 0.0

    def __init__(
        self,
        *,
        update: str = "bilevel",
        gumbel: bool = False,
        strength: float = 1.0,
        balance: float = 1.0,
        temperature: float = 1.0,
        strength_lr: float = 2e-2,
    ) -> None:
        if update not in ("bilevel", "mixed", "single"):
            raise InvalidArgument(f"update must be 'bilevel', 'mixed' or 'single', got {update!r}")
        if number("temperature", temperature) == 0:
            raise InvalidArgument("temperature must be above 0, got 0")
        self.update, self.gumbel, self.temperature = update, gumbel, float(temperature)
        self.strength, self.balance = number("strength", strength), number("balance", balance)
        self.strength_lr = number("strength_lr", strength_lr)
        self.passes = 2 if update == "single" else 3

    def loader(self, train: Iterable[Any]) -> Iterable[Any]:
        return train if self.update == "single" else train_val_split(train, self.seed)

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        self.graph, self.candidates = graph, candidates

        def make(layer: Any, module: nn.Module) -> tuple[nn.Module, nn.Module]:
            c = candidates[layer.name]
            return Mixture(c.weight, signed=True), Mixture(c.activation, signed=False)

        self.layers = quantize_layers(model, graph, candidates, make)
        self.mixtures = list({id(m): m for m in model.modules() if isinstance(m, Mixture)}.values())
        self.costs = DifferentiableCosts(graph, self.limits)

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        """Initialize the scale of every bit-width to minimize the squared error."""
        for name, layer in self.layers.items():
            for bits in layer.weight_quantizer.widths:
                layer.weight_quantizer.lsq.init(bits, weight_scale_mse(layer.weight, bits, axis=None))
            if layer.input_quantizer is not None and name in inputs:
                for bits in layer.input_quantizer.widths:
                    layer.input_quantizer.lsq.init(bits, *activation_scale(inputs[name], bits, mse=True))

    def own_groups(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "params": [getattr(m, name) for m in self.mixtures],
                "lr": self.strength_lr,
                "weight_decay": 0,
            }
            for name in ("strengths", "prices")
        ]

    def begin_step(self, model: nn.Module, step: int, total: int) -> None:
        for mixture in self.mixtures:
            mixture.temperature = self.temperature * 0.1 ** (step / max(total - 1, 1))

    def widths(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return `{layer: expected (weight bits, activation bits)}`.

        Strengths are independent, so the product is the expected product of the bit-widths.
        """
        return {
            name: (
                m.weight_quantizer.expected_width(),
                None if m.input_quantizer is None else m.input_quantizer.expected_width(),
            )
            for name, m in self.layers.items()
        }

    def penalty(self) -> Tensor:
        """Compute strength · Σ relu(E[cost]/cap − 1), which has a gradient even where it is zero."""
        idle = sum(m.prices.sum() for m in self.mixtures) * 0.0
        return self.strength * self.costs.over(self.widths()).to(idle) + idle  # type: ignore[union-attr,arg-type,return-value]

    def _draw(self, rng: random.Random) -> None:
        if self.gumbel:
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            for mixture in self.mixtures:
                mixture.draw(generator)

    def losses(self, model: nn.Module, batch: Any, rng: random.Random) -> Iterator[tuple[Tensor, Groups]]:
        self._draw(rng)
        if self.update == "single":
            yield self.task(model, batch), (*NETWORK, "strengths")
        else:
            train, held = batch
            yield self.task(model, train), (*NETWORK, "strengths") if self.update == "mixed" else NETWORK
            self._draw(rng)
            yield (self.balance if self.update == "mixed" else 1.0) * self.task(model, held), "strengths"
        yield self.penalty(), "prices"

    def before_step(self, model: nn.Module, step: int) -> None:
        """Scale gradients of strengths and prices by one factor that sets the strengths' root mean square to RMS."""
        grads = [m.strengths.grad for m in self.mixtures if m.strengths.grad is not None]
        if not grads:
            return
        rms = torch.cat(grads).square().mean().sqrt().clamp_min(1e-12)
        for mixture in self.mixtures:
            for parameter in (mixture.strengths, mixture.prices):
                if parameter.grad is not None:
                    parameter.grad.mul_(RMS / rms)

    def task(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss of the task."""
        return self.loss.loss(model, batch)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        """Return −log softmax(strengths), made non-increasing, of both operands."""

        def row(m: Mixture) -> dict[int, float]:
            scores = falling((-torch.log_softmax(m.strengths.double(), 0)).tolist())
            return {b: s + TIE * 4.0**-b for b, s in zip(m.widths, scores, strict=True)}

        weight = {n: row(m.weight_quantizer) for n, m in self.layers.items()}
        activation = {n: row(m.input_quantizer) for n, m in self.layers.items() if m.input_quantizer is not None}
        return additive(self.graph, weight, activation)

    def details(self, model: nn.Module) -> dict[str, Any]:
        with torch.no_grad():
            reached = {name: float(x) for name, x in self.costs.ratios(self.widths()).items()}
            sharpest = max((float(m.probabilities().max()) for m in self.mixtures), default=0.0)
        return {"update": self.update, "gumbel": self.gumbel, "reached": reached, "largest_probability": sharpest}
