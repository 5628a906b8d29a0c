"""Training-free scores: seconds to minutes on a few batches, for any model with a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import FLOAT_BITS, Candidates, LayerBits, LayerGraph
from ..core.checks import whole
from ..errors import InvalidArgument
from ..nn.calibrate import calibrate_inputs, calibrate_weights, widths_off
from ..nn.quantize import quantize_with_lsq
from ..nn.rounded_weights import quantize_with_stored
from ..quantizers import LSQ
from ..train.norms import batch_statistics
from ..train.random_draws import fixed_draws
from .scores import Scores
from .sensitivity import Rows, Sensitivity, at, counted, sensitivity
from .strategy import SearchStrategy, additive, register_strategy


def read(inputs: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the sampled input of a layer, or a one if no batch reached it, so that it can be scored."""
    return inputs.get(name, torch.ones(1))


class PostTraining(SearchStrategy):
    """Base class of training-free strategies: calibrated LSQ quantizers at every candidate bit-width.

    A subclass fills `weight` and `activation`, each `{layer: {bits: score}}`, in `measure`. A score estimates the mean
    divergence of the task's output over items when this operand alone is quantized, so that the sum over layers
    predicts the divergence of a whole policy. Labels are ignored.

    Args:
        batches: Number of batches, at least 1.
    """

    trains, keeps_weights = False, True

    def __init__(self, *, batches: int = 2) -> None:
        self.batches = whole("batches", batches, 1)
        self.weight: Rows = {}
        self.activation: Rows = {}
        self.groups: dict[str, LayerBits] = {}  # of quantizers that only have bit-widths

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        self.graph, self.normed = graph, set(norms.values())
        widths = {n: (c.weight, () if c.float_inputs else c.activation) for n, c in candidates.items()}
        if self.rounded is not None:
            self.layers = quantize_with_stored(model, graph, self.rounded, candidates)
            return
        groups = self.groups = {n: c.weights[-1] for n, c in candidates.items()}
        if several := [n for n, c in candidates.items() if len(c.grids) > 1]:
            raise InvalidArgument(
                f"layer {several[0]!r} has several candidate group sizes, so its weight must be rounded first; use "
                "quantize(…, train=batches, epochs=0) with rounding='gptq' or 'nearest'"
            )
        self.layers = quantize_with_lsq(model, graph, widths, per_channel=True, groups=groups)

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        if self.rounded is None:
            calibrate_weights(model, mse=True)
        calibrate_inputs(model, dict(inputs), mse=True)
        model.eval()
        with widths_off(model):
            self.measure(model, batches, inputs)
            if not self.unit:
                with torch.no_grad():
                    self.unit = self.loss.task.unit(self.output(model, batches[0]))

    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        """Fill `weight` and `activation`. All quantizers are off; `at` turns one on."""
        raise NotImplementedError

    def quantizers(self) -> Iterator[tuple[str, Rows, Any, Any]]:
        """Yield (layer name, rows to fill, quantizer, layer) of every operand whose bit-width is searched."""
        for name, module in self.layers.items():
            yield name, self.weight, module.weight_quantizer, module
            if module.input_quantizer is not None:
                yield name, self.activation, module.input_quantizer, module

    def output(self, model: nn.Module, batch: Any) -> Any:
        """Compute the output of the network, with the same random numbers each time if it draws some."""
        with fixed_draws(next(model.parameters()).device, self.seed):
            return self.loss.task.forward(model, batch)

    def divergence(self, model: nn.Module, batches: Sequence[Any], references: Sequence[Any]) -> float:
        """Compute the mean divergence from the references, over the items that count, with the current quantizers."""
        moved, items = 0.0, 0
        for batch, reference in zip(batches, references, strict=True):
            values, kept = self.loss.task.divergence(self.output(model, batch), reference, self.loss.task.mask(batch))
            moved, items = moved + float(values[kept].double().sum()), items + int(kept.sum())
        return max(moved, 0.0) / counted(items)

    def scores(self, model: nn.Module) -> Scores:
        weight: dict[str, dict[Any, float]] = {**self.weight}
        for name, form in self.groups.items():
            grouped = {b: LayerBits(b, FLOAT_BITS).with_groups(form.group_size, form.symmetric) for b in weight[name]}
            weight[name] = {grouped[b]: score for b, score in weight[name].items()}
        return additive(self.graph, weight, self.activation)


def noise(quantizer: LSQ, x: Tensor) -> dict[int, Tensor]:
    """Return `{bits: Q(x) − x}` for all bit-widths."""
    out = {}
    for bits in quantizer.widths:
        with at(quantizer, bits):
            out[bits] = quantizer(x) - x
    return out


@register_strategy("mse")
class MSE(PostTraining):
    """Scores by relative squared error: ‖Q(T) − T‖² / ‖T‖² of weights and inputs, times a factor for all layers.

    The factor, which is our construction, makes the scores at the middle candidate bit-widths add up to the divergence
    that is measured with every searched layer at its middle bit-width, so that the scores have the unit of the
    divergence. The scores reflect how large the error of each layer is, but not how much it matters. Where layers
    differ in that, as in decoders, they cannot rank policies well; a search with `validate=` reports this. This is the
    cheapest strategy, for models without a backward pass.

    Args:
        batches: Number of batches, at least 1.
    """

    factor = 1.0

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        for name, row, quantizer, module in self.quantizers():
            x = module.weight if row is self.weight else read(inputs, name).to(module.weight.device)
            power = float(x.double().square().sum()) or 1.0
            found = noise(quantizer, x if row is self.weight else x[None])
            row[name] = {b: float(e.double().square().sum()) / power for b, e in found.items()}
        self.factor = self._factor(model, batches)
        for rows in (self.weight, self.activation):
            rows.update({n: {b: self.factor * score for b, score in found.items()} for n, found in rows.items()})

    def _factor(self, model: nn.Module, batches: Sequence[Any]) -> float:
        """Return measured divergence / sum of scores at the middle bit-widths; 1 if one of them is not positive."""
        with batch_statistics(model):
            references = [self.output(model, batch) for batch in batches]
            total = 0.0
            for name, row, quantizer, _ in self.quantizers():
                middle = quantizer.widths[(len(quantizer.widths) - 1) // 2]
                quantizer.set_width(middle)
                total += row[name][middle]
            measured = self.divergence(model, batches, references)
        for _, _, quantizer, _ in self.quantizers():
            quantizer.set_width(None)
        return measured / total if measured > 0 and total > 0 else 1.0

    def details(self, model: nn.Module) -> dict[str, Any]:
        return {"factor": self.factor}


@register_strategy("kl")
class KL(PostTraining):
    """Scores by the measured divergence of the output with one operand of one layer quantized.

    For classes, this is the KL divergence, else the squared error of all outputs relative to their variance. It takes
    one forward pass per layer, operand and bit-width.

    BatchNorms whose statistics a policy re-estimates normalise by the batch in both networks, which is our
    construction.

    Args:
        batches: Number of batches, at least 1.
    """

    def __init__(self, *, batches: int = 1) -> None:
        super().__init__(batches=batches)

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        with batch_statistics(model):
            references = [self.output(model, batch) for batch in batches]
            for name, row, quantizer, _ in self.quantizers():
                row[name] = {}
                for bits in quantizer.widths:
                    with at(quantizer, bits):
                        row[name][bits] = self.divergence(model, batches, references)


@register_strategy("gradient")
class Gradient(PostTraining):
    """Scores by the divergence that `sensitivity` estimates, at calibrated scales: LIMPQ's default without training.

    Args:
        batches: Number of batches, at least 1.
    """

    found: Sensitivity

    def __init__(self, *, batches: int = 16) -> None:
        super().__init__(batches=batches)

    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        self.found = sensitivity(self.layers, model, batches, self.loss.task, self.normed, self.seed)
        self.weight, self.activation, self.unit = self.found.weight, self.found.activation, self.found.unit

    def details(self, model: nn.Module) -> dict[str, Any]:
        return {"standard_error": self.found.relative_error()}
