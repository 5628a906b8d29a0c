"""Re-estimate BatchNorm statistics, since quantized activations have other means and variances than float ones; and
let BatchNorm train on batches that have no statistics."""

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
    """Count, mean and sum of squared deviations of every channel that a norm read, over batches of any sizes."""

    def __init__(self, like: Tensor) -> None:
        self.count = 0.0
        self.mean, self.squares = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, x: Tensor) -> None:
        """Take in a batch [N, C, …] (the parallel formula of Chan et al., which does not cancel)."""
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
        """Become the statistics of what all processes read."""
        from accelerate.utils import reduce

        (whole,) = total(self.count)
        mean = reduce(self.mean * (self.count / max(whole, 1.0)), "sum")
        self.squares = reduce(self.squares + self.count * (self.mean - mean).square(), "sum")
        self.mean, self.count = mean, whole


def _values(x: Tensor) -> int:
    """How many values of each channel a batch [N, C, …] has."""
    return x.numel() // max(x.shape[1], 1)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))  # type: ignore[no-any-return]


@contextmanager
def single_values_allowed(model: nn.Module) -> Iterator[None]:
    """While training, a BatchNorm takes its running statistics for a batch with one value of each channel (a last batch
    of one sample): such a batch has no variance, and torch refuses it."""
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
        # a synchronized norm has the values of the other processes' batches too
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
            handles.append(norm.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(norm.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _estimated(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The norms whose statistics are those of data: not folded ones."""
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and not is_folded(m)
    ]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let every norm that `reestimate_batch_norm` would change normalise by the batch; running statistics stay."""
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
    """Replace running statistics by those of all values that a norm reads in up to `limit` batches of each process.

    Mean and unbiased variance as if the batches were one (the law of total variance): each counts by its samples, and
    one of a single sample by its mean. While they run, norms normalise by the batch.

    A folded BatchNorm (identity statistics of a model whose convolutions hold the affine part) must not be
    re-estimated: such a norm has mean 0 and variance 1 throughout and is left alone. So is one that nothing reached.

    Args:
        model: The network.
        batches: What it runs on.
        limit: How many of them at most.
        alone: Of this process's batches only, without a word to the other processes.
        task: What the model is for; None to find out from it.
        example: One input as the network takes it, which says how many inputs a batch has.

    Returns:
        How many batches this process used.
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
        norm.momentum = None  # cumulative average, for a single value on the way
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
    """Whether statistics say nothing: mean 0 and variance 1 (within float noise) in every channel."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        return False
    return bool((mean.abs() < 1e-6).all() and ((var - 1).abs() < 2e-3).all())
