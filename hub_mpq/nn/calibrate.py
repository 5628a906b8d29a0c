"""Initialize all quantizers of a model from its weights and from a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import LSQ, GroupedLSQ, activation_scale, weight_scale_sigma
from ..quantizers.base import channel_rows
from ..quantizers.weight_grid import weight_grid
from .layers import first_operand
from .quantize import quantized_layers
from .routed_experts import routed_experts

_SAMPLE = 1 << 16  # values kept per layer and batch: enough for a scale, little to hold


def _thin(x: Tensor) -> Tensor:
    """An evenly spaced sample of the values of x. The stride is odd so that it does not align with the channels."""
    flat = x.detach().flatten()
    step = max(flat.numel() // _SAMPLE, 1) | 1
    return flat[::step].float()


@contextmanager
def widths_off(model: nn.Module) -> Iterator[None]:
    """Let all quantizers pass their input through, and restore their bit-widths on exit."""
    quantizers = [m for m in model.modules() if isinstance(m, LSQ)]
    kept = [q._index for q in quantizers]
    for q in quantizers:
        q.set_width(None)
    try:
        yield
    finally:
        for q, index in zip(quantizers, kept, strict=True):
            q._index = index


@torch.no_grad()
def sample_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Sample the inputs of layers in float forwards in eval mode.

    Args:
        model: A float model, or one with LSQ quantizers, which are switched off temporarily.
        batches: The batches to run the model on.
        run: `run(model, batch)` runs the model.
        names: The layers; None for all with an input quantizer.

    Returns:
        {layer name: evenly spaced sample of its inputs, float32, 1-D}, without layers that did not run; an expert that
        no token reached gets the samples of the others. If there is no layer to sample, the model does not run.
    """
    if names is None:
        names = [name for name, module in quantized_layers(model) if module.input_quantizer is not None]
    names = list(names)
    if not names:
        return {}
    samples: dict[str, list[Tensor]] = {}
    handles = []
    for name in names:

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            samples.setdefault(name, []).append(_thin(first_operand(args, kwargs)))

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    training = model.training
    model.eval()
    try:
        with widths_off(model):
            for batch in batches:
                run(model, batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    found = {name: torch.cat(parts) for name, parts in samples.items()}
    for experts in routed_experts(model):
        reached = [found[name] for name in experts.values() if name in found]
        if reached:
            found |= {name: torch.cat(reached) for name in experts.values() if name in names and name not in found}
    return found


@torch.no_grad()
def calibrate_weights(model: nn.Module, *, mse: bool) -> None:
    """Set the scales of all weights from the weights alone, by `weight_grid` or LIMPQ's initial value (per tensor).

    Args:
        model: The model.
        mse: Use `weight_grid`.
    """
    for _, module in quantized_layers(model):
        for bits in module.weight_quantizer.widths:
            calibrate_weight(module, bits, mse=mse)


@torch.no_grad()
def calibrate_inputs(model: nn.Module, samples: dict[str, Tensor], *, mse: bool) -> None:
    """Set the scales and zero points of all activations at every bit-width from samples of the layers' inputs."""
    for name, module in quantized_layers(model):
        if module.input_quantizer is not None and name in samples:
            for bits in module.input_quantizer.widths:
                calibrate_input(module, samples[name], bits, mse=mse)


@torch.no_grad()
def calibrate_weight(module: Any, bits: int, *, mse: bool) -> None:
    """Set the scales of one quantized layer's weight at one bit-width, as in `calibrate_weights`."""
    q = module.weight_quantizer
    if isinstance(q, GroupedLSQ):
        rows = (module.weight.mT if q.transposed else module.weight).reshape(q.rows, q.columns)
        q.init(bits, *weight_grid(rows, bits, group_size=q.group_size, symmetric=q.symmetric))
    elif not mse and bits > 1:
        q.init(bits, weight_scale_sigma(module.weight, bits))
    elif q.base.shape[1] == 1:
        q.init(bits, weight_grid(module.weight.reshape(1, -1), bits)[0].flatten())
    else:
        q.init(bits, weight_grid(channel_rows(module.weight, q.axis), bits)[0].flatten())


@torch.no_grad()
def calibrate_input(module: Any, sample: Tensor, bits: int, *, mse: bool) -> None:
    """Set the scale and zero point of one quantized layer's input at one bit-width from a sample of its inputs."""
    module.input_quantizer.init(bits, *activation_scale(sample, bits, mse=mse))
