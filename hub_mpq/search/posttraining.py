"""Scorers for users who cannot train: seconds to minutes on a few batches, any model with a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Candidates, LayerGraph
from ..core.checks import whole
from ..nn.calibrate import calibrate_inputs, calibrate_weights, widths_off
from ..nn.quantize import quantize_with_lsq
from ..quantizers import LSQ
from ..train.random_draws import fixed_draws
from .scores import Scores
from .sensitivity import Rows, Sensitivity, at, sensitivity
from .strategy import SearchStrategy, additive, register_strategy


def read(inputs: Mapping[str, Tensor], name: str) -> Tensor:
    """What a layer reads; a one where no batch reached it, so that it has scores like the others."""
    return inputs.get(name, torch.ones(1))


class PostTraining(SearchStrategy):
    """Base of the scorers: LSQ quantizers at every candidate width, scales of least squared error, no training.

    A scorer fills `weight` and `activation` ({layer: {bits: score}}) in `measure`; scores add up.
    batches: how many are looked at. Raises InvalidArgument unless that is a whole number of at least 1.
    """

    trains = False

    def __init__(self, *, batches: int = 2) -> None:
        self.batches = whole("batches", batches, 1)
        self.weight: Rows = {}
        self.activation: Rows = {}

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        self.graph, self.normed = graph, set(norms.values())
        widths = {n: (c.weight, () if c.float_inputs else c.activation) for n, c in candidates.items()}
        self.layers = quantize_with_lsq(model, graph, widths, per_channel=True)

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        calibrate_weights(model, mse=True)
        calibrate_inputs(model, dict(inputs), mse=True)
        model.eval()
        with widths_off(model):
            self.measure(model, batches, inputs)

    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        """Fill the rows. All quantizers are off; `at` turns one on."""
        raise NotImplementedError

    def quantizers(self) -> Iterator[tuple[str, Rows, Any, Any]]:
        """(layer name, row to fill, quantizer, layer) of every operand that has a width to choose."""
        for name, module in self.layers.items():
            yield name, self.weight, module.weight_quantizer, module
            if module.input_quantizer is not None:
                yield name, self.activation, module.input_quantizer, module

    def scores(self, model: nn.Module) -> Scores:
        return additive(self.graph, self.weight, self.activation)


def noise(quantizer: LSQ, x: Tensor) -> dict[int, Tensor]:
    """{bits: Q(x) − x} at all widths."""
    out = {}
    for bits in quantizer.widths:
        with at(quantizer, bits):
            out[bits] = quantizer(x) - x
    return out


@register_strategy("mse")
class MSE(PostTraining):
    """‖Q(T) − T‖² / ‖T‖² of weights and of inputs. Relative, because layers have scales of their own [ours]."""

    unit = "squared error relative to the tensor"

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        for name, row, quantizer, module in self.quantizers():
            x = module.weight if row is self.weight else read(inputs, name).to(module.weight.device)
            power = float(x.double().square().sum()) or 1.0
            found = noise(quantizer, x if row is self.weight else x[None])
            row[name] = {b: float(e.double().square().sum()) / power for b, e in found.items()}


@register_strategy("kl")
class KL(PostTraining):
    """How far the output moves when one operand alone is quantized: the task's divergence, KL where there are classes,
    else the squared error of all outputs in units of their variance. One forward a layer, operand and width."""

    unit = "divergence of the output"

    def __init__(self, *, batches: int = 1) -> None:
        super().__init__(batches=batches)

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        task = self.loss.task
        targets = [self._output(model, batch) for batch in batches]
        for name, row, quantizer, _ in self.quantizers():
            row[name] = {}
            for bits in quantizer.widths:
                with at(quantizer, bits):
                    row[name][bits] = sum(
                        float(task.distillation(self._output(model, b), t, b))
                        for b, t in zip(batches, targets, strict=True)
                    ) / len(batches)

    def _output(self, model: nn.Module, batch: Any) -> Any:
        """On the same random numbers each time, where the model draws some."""
        with fixed_draws(next(model.parameters()).device, self.seed):
            return self.loss.task.forward(model, batch)


@register_strategy("gradient")
class Gradient(PostTraining):
    """The divergence's estimate by `sensitivity`, at scales of least squared error: LIMPQ's default without its
    training."""

    found: Sensitivity

    def __init__(self, *, batches: int = 16) -> None:
        super().__init__(batches=batches)

    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        self.found = sensitivity(self.layers, model, batches, self.loss.task, self.normed, self.seed)
        self.weight, self.activation, self.unit = self.found.weight, self.found.activation, self.found.unit

    def details(self, model: nn.Module) -> dict[str, Any]:
        return {"standard_error": self.found.relative_error()}
