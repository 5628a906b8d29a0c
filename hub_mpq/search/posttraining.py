"""Scorers for users who cannot train: seconds to minutes on a few batches, any model with a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.calibrate import calibrate_inputs, calibrate_weights, widths_off
from ..nn.layers import CHANNEL_AXIS
from ..quantizers import LSQ
from ..spec import Candidates, LayerGraph
from ..train.batch import distillation_loss, forward, labels_of, logits_of, size_of, task_loss
from .install import install
from .scores import Scores
from .strategy import SearchStrategy, additive, register_strategy

Rows = dict[str, dict[int, float]]


class PostTraining(SearchStrategy):
    """Base of the scorers: LSQ quantizers at every candidate width, scales of least squared error, no training.

    A scorer fills `weight` and `activation` ({layer: {bits: score}}) in `measure`; scores add up.
    batches: how many are looked at.
    """

    trains = False

    def __init__(self, *, batches: int = 2) -> None:
        self.batches = batches
        self.weight: Rows = {}
        self.activation: Rows = {}

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        self.graph = graph

        def make(layer: Any, module: nn.Module) -> tuple[nn.Module, nn.Module]:
            c, device, axis = candidates[layer.name], next(module.parameters()).device, CHANNEL_AXIS[layer.kind]
            weight = LSQ(c.weight, signed=True, channels=layer.weight_shape[axis], axis=axis)
            return weight.to(device), LSQ(c.activation, signed=False).to(device)

        self.layers = install(model, graph, make)

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        calibrate_weights(model, mse=True)
        calibrate_inputs(model, dict(inputs), mse=True)
        model.eval()
        with widths_off(model):
            self.measure(model, batches, inputs)

    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        """Fill the rows. All quantizers are off; `at` turns one on."""
        raise NotImplementedError

    def quantizers(self) -> Iterator[tuple[str, Rows, LSQ, nn.Module]]:
        """(layer name, row to fill, quantizer, layer) of every operand that has a width to choose."""
        for name, module in self.layers.items():
            yield name, self.weight, module.weight_quantizer, module
            if module.input_quantizer is not None:
                yield name, self.activation, module.input_quantizer, module

    def scores(self, model: nn.Module) -> Scores:
        return additive(self.graph, self.weight, self.activation)


@contextmanager
def at(quantizer: LSQ, bits: int) -> Iterator[None]:
    """One quantizer on at a width, then off."""
    quantizer.set_width(bits)
    try:
        yield
    finally:
        quantizer.set_width(None)


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

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        for name, row, quantizer, module in self.quantizers():
            x = module.weight if row is self.weight else inputs.get(name, torch.ones(1)).to(module.weight.device)
            power = float(x.double().square().sum()) or 1.0
            found = noise(quantizer, x if row is self.weight else x[None])
            row[name] = {b: float(e.double().square().sum()) / power for b, e in found.items()}


@register_strategy("kl")
class KL(PostTraining):
    """How far the output moves when one operand alone is quantized: KL divergence of class logits, else the squared
    error relative to the output's power. One forward a layer, operand and width."""

    def __init__(self, *, batches: int = 1) -> None:
        super().__init__(batches=batches)

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        targets = [forward(model, batch) for batch in batches]
        for name, row, quantizer, _ in self.quantizers():
            row[name] = {}
            for bits in quantizer.widths:
                with at(quantizer, bits):
                    row[name][bits] = sum(
                        float(distillation_loss(forward(model, b), t, classes=_has_classes(b, t)))
                        for b, t in zip(batches, targets, strict=True)
                    ) / len(batches)


def _has_classes(batch: Any, output: Any) -> bool:
    labels = labels_of(batch)
    return getattr(output, "logits", None) is not None or (labels is not None and not labels.is_floating_point())


@register_strategy("gradient")
class Gradient(PostTraining):
    """Σ g_Y²·(Q(Y) − Y)², Y the layer's output with its weight or its input quantized, g_Y the gradient of the loss:
    the diagonal Fisher's estimate of the loss's growth [formula sure; which tensor Y is, and sums per sample: ours].
    Without labels the loss is n·y with a standard normal n, whose squared gradients are on average those of the
    output's own squared error [ours]."""

    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        kept: dict[str, tuple[Any, ...]] = {}
        handles = []
        for name, module in self.layers.items():
            row = {"weight": dict.fromkeys(module.weight_quantizer.widths, 0.0)}
            self.weight[name] = row["weight"]
            if module.input_quantizer is not None:
                self.activation[name] = dict.fromkeys(module.input_quantizer.widths, 0.0)

            def keep(_m: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                kept[name] = (args[0].detach(), output.detach())
                if output.requires_grad:
                    output.register_hook(lambda grad: self._add(name, kept.pop(name), grad))

            handles.append(module.register_forward_hook(keep))
        try:
            for batch in batches:
                self.factor = size_of(batch) / len(batches)
                model.zero_grad(set_to_none=True)
                self.probe(model, batch).backward()
        finally:
            model.zero_grad(set_to_none=True)
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add(self, name: str, seen: tuple[Any, Tensor], grad: Tensor) -> None:
        module, (x, y) = self.layers[name], seen
        weight = grad.square() * self.factor  # the loss is a mean: N·Σ g² is the mean of squares of one sample's
        for rows, quantizer in ((self.weight, module.weight_quantizer), (self.activation, module.input_quantizer)):
            if quantizer is None or name not in rows:
                continue
            for bits in quantizer.widths:
                with at(quantizer, bits):
                    # the class's forward: calling the module would run this very hook again
                    moved = type(module).forward(module, x) - y
                rows[name][bits] += float((weight * moved.square()).sum())

    def probe(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss whose gradients count, a mean over samples."""
        if labels_of(batch) is not None:
            return task_loss(model, batch)[0]
        y = logits_of(forward(model, batch)).float()
        n = torch.randn(y.shape, generator=torch.Generator().manual_seed(self.seed)).to(y)
        return (y / y.detach().square().mean().sqrt().clamp_min(1e-12) * n).sum() / len(y)
