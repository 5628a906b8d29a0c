"""Inputs for calibration when the user gives none: noise, drawn towards the statistics that BatchNorm remembers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import first_operand

STEPS = 20
BATCH = 8


def _noise(value: Any, generator: torch.Generator, vocabulary: int | None) -> Any:
    if isinstance(value, Mapping):
        return {k: _noise(v, generator, vocabulary if "ids" in k else None) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_noise(v, generator, vocabulary) for v in value)
    if not isinstance(value, Tensor):
        return value
    shape = (BATCH, *value.shape[1:])
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype)
    if vocabulary is not None and value.dtype in (torch.int32, torch.int64):
        return torch.randint(vocabulary, shape, generator=generator, dtype=value.dtype)
    return value[:1].expand(shape).clone()  # masks and positions as the example has them


def synthetic_batch(model: nn.Module, example: Any, seed: int = 0) -> Any:
    """A batch shaped like `example`: Gaussian noise for float inputs, random ids for tokens.

    With BatchNorm layers, float noise is optimised for a few steps so that each norm's input has the mean and
    variance it remembers (the idea of ZeroQ, Cai et al., 2020) [our schedule].
    """
    generator = torch.Generator().manual_seed(seed)
    batch = _noise(example, generator, getattr(getattr(model, "config", None), "vocab_size", None))
    if isinstance(batch, tuple) and len(batch) == 1:
        batch = batch[0]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or not isinstance(batch, Tensor) or not batch.is_floating_point():
        return batch
    return _match_statistics(model, norms, batch)


def _match_statistics(model: nn.Module, norms: list[nn.modules.batchnorm._BatchNorm], batch: Tensor) -> Tensor:
    device = next(model.parameters()).device
    losses: list[Tensor] = []

    def hook(norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = first_operand(args, kwargs).float()
        axes = [d for d in range(x.dim()) if d != 1]
        sigma = norm.running_var.clamp_min(1e-8).sqrt()
        mean = (x.mean(axes) - norm.running_mean) / sigma
        spread = x.var(axes, unbiased=False).clamp_min(1e-8).sqrt() / sigma - 1
        losses.append(mean.square().mean() + spread.square().mean())

    training = model.training
    model.eval()
    handles = [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in norms]
    x = batch.to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    try:
        with torch.enable_grad():
            for _ in range(STEPS):
                losses.clear()
                model(x)
                (grad,) = torch.autograd.grad(torch.stack(losses).mean(), [x])
                x.grad = grad
                optimizer.step()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return x.detach()
