"""BatchNorm statistics: re-estimation after quantization, and training on batches that have no variance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks import TaskLike, task_of, to_device
from .processes import total, world


class _Statistics:
    """Count, mean and sum of squared deviations of every input channel of a norm, over batches of any sizes."""

    def __init__(self, like: Tensor) -> None:
        self.count = 0.0
        self.mean, self.squares = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, x: Tensor) -> None:
        """Add a batch `[N, C, …]`, by the parallel formula of Chan et al., which avoids cancellation."""
        count = _values(x)
        if not count:
            return
        x = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        whole = self.count + count
        off = mean - self.mean
        self.mean = self.mean + off * (count / whole)
        self.squares = self.squares + count * var + off.square() * (self.count * count / whole)
        self.count = whole

    def of_all_processes(self) -> None:
        """Combine the statistics of all processes."""
        from accelerate.utils import reduce

        (whole,) = total(self.count)
        mean = reduce(self.mean * (self.count / max(whole, 1.0)), "sum")
        self.squares = reduce(self.squares + self.count * (self.mean - mean).square(), "sum")
        self.mean, self.count = mean, whole


def _values(x: Tensor) -> int:
    """Number of values of each channel in a batch `[N, C, …]`."""
    return x.numel() // max(x.shape[1], 1)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))  # type: ignore[no-any-return]


@contextmanager
def single_values_allowed(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm train on a batch with one value per channel, such as a last batch of one sample.

    Such a batch has no variance, and torch rejects it; the running statistics are used instead.
    """
    lent: set[nn.Module] = set()

    def before(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if norm.training and _values(_input(args, kwargs)) == 1:
            norm.training = False
            lent.add(norm)

    def after(norm: nn.Module, *_: Any) -> None:
        if norm in lent:
            lent.remove(norm)
            norm.training = True

    handles = []
    for norm in model.modules():
        # a synchronized norm also has the values of the other processes' batches
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
            handles.append(norm.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(norm.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _estimated(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the norms that have statistics of data, so not the folded ones."""
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and not is_folded(m)
    ]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch in every norm that `reestimate_batch_norm` would change; keep the running statistics."""
    norms = _estimated(model)
    kept = [(m.momentum, m.training, m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 0.0
    try:
        with single_values_allowed(model):
            yield
    finally:
        for norm, (momentum, was, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.training = momentum, was
            norm.num_batches_tracked.copy_(count)


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    limit: int = 32,
    alone: bool = False,
    task: TaskLike = None,
    example: Any = None,
) -> int:
    """Re-estimate the running statistics of BatchNorm, because quantization changes means and variances.

    The new mean and unbiased variance are those of all inputs of a norm, as if the batches were one (law of total
    variance): each batch is weighted by its samples, and a batch of one sample contributes its mean. During the forward
    passes, norms normalise by the batch.

    A folded BatchNorm, whose affine part is in the convolution before it, has mean 0 and variance 1 in every channel
    and is not changed. Neither is a norm without inputs.

    Args:
        model: The network.
        batches: Batches to run the network on.
        limit: Maximum number of batches of each process.
        alone: Whether to use this process's batches only, without communicating with the other processes.
        task: Task of the model; None to infer it from the model.
        example: One input as the network takes it, which tells how many inputs a batch has.

    Returns:
        Number of batches that this process used.
    """
    norms = _estimated(model)
    if not norms:
        return 0
    seen = {norm: _Statistics(norm.running_mean) for norm in norms}
    handles = [
        norm.register_forward_pre_hook(lambda m, a, k: seen[m].add(_input(a, k)), with_kwargs=True) for norm in norms
    ]
    kept = [(m.momentum, m.training, m.running_mean.clone(), m.running_var.clone()) for m in norms]
    training = model.training
    model.eval()
    for norm in norms:
        norm.train()
        norm.num_batches_tracked.zero_()
        norm.momentum = None  # cumulative average, used by batches of a single value
    used = 0
    known = task_of(task, model, example=example)
    try:
        with single_values_allowed(model):
            for batch in islice(batches, limit):
                known.forward(model, to_device(batch, next(model.parameters()).device))
                used += 1
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
        for norm, (momentum, was, mean, var) in zip(norms, kept, strict=True):
            norm.momentum, norm.training = momentum, was
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
    for norm, found in seen.items():
        if world()[1] > 1 and not alone:
            found.of_all_processes()
        if found.count > 1:
            norm.running_mean.copy_(found.mean)
            norm.running_var.copy_(found.squares / (found.count - 1))
    return used


def is_folded(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether a norm is folded: mean 0 and variance 1, up to rounding, in every channel."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        return False
    return bool((mean.abs() < 1e-6).all() and ((var - 1).abs() < 2e-3).all())
