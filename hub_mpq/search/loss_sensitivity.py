"""How much the loss grows when one operand of one layer is quantized: the Fisher's estimate, per sample."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import first_operand
from ..quantizers import LSQ
from ..tasks.batch import size_of

Rows = dict[str, dict[int, float]]
LEAST = 1e-30


@contextmanager
def at(quantizer: LSQ, bits: int) -> Iterator[None]:
    """One quantizer on at a width, then off."""
    quantizer.set_width(bits)
    try:
        yield
    finally:
        quantizer.set_width(None)


def like(moved: Tensor, y: Tensor) -> Tensor:
    """`moved` with each channel's mean and deviation (dimension 1) brought to those of `y`, as a BatchNorm that reads
    it will once it has seen it."""
    dims = [d for d in range(y.dim()) if d != 1]
    spread = moved.std(dims, correction=0, keepdim=True)
    deviation = torch.where(spread > 0, y.std(dims, correction=0, keepdim=True) / spread, 0.0)
    return (moved - moved.mean(dims, keepdim=True)) * deviation + y.mean(dims, keepdim=True)


def loss_sensitivity(
    layers: Mapping[str, Any],
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    normed: Collection[str] = (),
) -> tuple[Rows, Rows]:
    """({layer: {bits: growth}} of its weight, the same of its input), means over samples, in the loss's own unit up to
    a factor of one half.

    The mean over samples of (Σ g_Y·(Q(Y) − Y))², Y the layer's output with its weight or its input quantized, g_Y the
    gradient of `loss(batch)`, a mean over samples. METHODS' score Σ g_Y²·(Q(Y) − Y)² is its diagonal; the errors of
    one weight at all places of an image add up, which the diagonal does not see [ours]. normed: layers whose output a
    BatchNorm reads; what it removes, a channel's shift and scale, is not counted for them [ours]. All quantizers of
    the layers must be off. One forward and backward a batch, and one run of each layer a width and operand.
    """
    weight: Rows = {n: dict.fromkeys(m.weight_quantizer.widths, 0.0) for n, m in layers.items()}
    activation: Rows = {
        n: dict.fromkeys(m.input_quantizer.widths, 0.0) for n, m in layers.items() if m.input_quantizer is not None
    }
    factor = 1.0

    @torch.no_grad()
    def add(name: str, x: Tensor, grad: Tensor) -> None:
        module = layers[name]
        # again, not kept from the forward: what follows a layer may have changed its output in place
        y = type(module).forward(module, x)
        for rows, quantizer in ((weight, module.weight_quantizer), (activation, module.input_quantizer)):
            if quantizer is None or name not in rows:
                continue
            for bits in quantizer.widths:
                with at(quantizer, bits):
                    # the class's forward: calling the module would run this very hook again
                    moved = type(module).forward(module, x)
                error = (like(moved, y) if name in normed else moved) - y
                # N·Σ of squares with a mean loss's gradient is the mean of one sample's own
                rows[name][bits] += factor * float((grad * error).flatten(1).sum(1).square().sum())

    handles = []
    for name, module in layers.items():

        def keep(
            _m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, name: str = name
        ) -> None:
            if output.requires_grad:
                x = first_operand(args, kwargs).detach()
                output.register_hook(lambda grad: add(name, x, grad))

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    try:
        for batch in batches:
            factor = size_of(batch) / len(batches)
            model.zero_grad(set_to_none=True)
            loss(batch).backward()
    finally:
        model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
    # a branch that the loss does not feel (its norm starts at zero) has the least growth that can be stored, not none
    floored = [
        {n: {b: max(v, LEAST) for b, v in row.items()} for n, row in rows.items()} for rows in (weight, activation)
    ]
    return floored[0], floored[1]
