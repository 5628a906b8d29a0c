"""The only training loop, on Accelerate."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InvalidArgument, TrainingDiverged
from .batch import size_of, to_device
from .checkpoint import Checkpoints, StopOnSignal
from .hooks import Hooks

CLIP_VALUE = 1.0  # LIMPQ's authors clip every gradient element


@dataclass
class TrainLog:
    """What a training did: optimizer steps, samples, wall seconds, median seconds a step, mean loss of each epoch."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    epoch_loss: list[float] = field(default_factory=list)


def _optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    groups = [{**g, "initial_lr": g["lr"]} for g in groups if g["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    if name == "adam":
        return torch.optim.AdamW(groups, weight_decay=0.0)
    raise InvalidArgument(f"optimizer is adam or sgd, not {name!r}")


def _renew(opt: Any, groups: list[dict[str, Any]]) -> None:
    """Empty an optimizer and give it these groups. A second one would be saved beside it and break resuming."""
    inner = opt.optimizer
    inner.state.clear()
    inner.param_groups.clear()
    for group in groups:
        if group["params"]:
            inner.add_param_group({**group, "initial_lr": group["lr"]})


def _cosine(step: int, total: int) -> float:
    """Learning-rate factor, from 1 to 0.001 (LIMPQ: 0.01 to 1e-5)."""
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))


def batches_per_epoch(loader: Iterable[Any], share: float = 1.0) -> int:
    """Batches of one epoch; InvalidArgument when the loader is empty or has no length."""
    if not 0 < share <= 1:
        raise InvalidArgument(f"the share of the data is above 0 and at most 1, not {share}")
    try:
        count = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidArgument("the loader has no length; give steps= for a stream") from None
    if count == 0:
        raise InvalidArgument("the data loader is empty")
    return math.ceil(count * share)


def _has_length(loader: Any) -> bool:
    """A DataLoader always has __len__; over a stream it raises."""
    try:
        len(loader)
    except TypeError:
        return False
    return True


def _epochs(loader: Any, per_epoch: int, start: int, device: torch.device) -> Iterator[tuple[int, int, Any]]:
    """(epoch, index in epoch, batch) without end, from optimizer step `start` on."""
    from accelerate import skip_first_batches

    epoch, skip = divmod(start, per_epoch)
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        prepared = hasattr(loader, "set_epoch") and skip > 0
        source = skip_first_batches(loader, skip) if prepared else loader
        seen = False
        for index, batch in enumerate(source, start=skip if prepared else 0):
            if index < skip:
                continue
            if index >= per_epoch:
                break
            seen = True
            yield epoch, index, to_device(batch, device)
        if not seen:
            raise InvalidArgument("the data loader is empty")
        epoch, skip = epoch + 1, 0


def fit(
    model: nn.Module,
    hooks: Hooks,
    loader: Iterable[Any],
    *,
    epochs: float = 1,
    steps: int | None = None,
    share: float = 1.0,
    optimizer: str = "adam",
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    label: str = "train",
    accelerator: Any = None,
) -> TrainLog:
    """Train `model` in place.

    epochs or steps: length (steps wins); share: part of each epoch's batches that is used.
    optimizer: "adam" (AdamW) or "sgd" (momentum 0.9), cosine schedule, gradients clipped by value.
    checkpoint_dir: resumable states go there every `checkpoint_every` steps and on SIGINT / SIGTERM.
    Raises TrainingDiverged on a NaN or infinite loss, InvalidArgument for empty data.
    """
    from huggingface_hub.utils import tqdm

    accelerator = accelerator or make_accelerator(seed=seed)
    if isinstance(loader, torch.utils.data.DataLoader):
        loader = accelerator.prepare(loader)
    per_epoch = steps if steps and not _has_length(loader) else batches_per_epoch(loader, share)
    total = steps if steps is not None else math.ceil(per_epoch * epochs)
    model.train()
    wrapped, opt = accelerator.prepare(model, _optimizer(optimizer, hooks.parameter_groups(model)))
    accelerator.register_for_checkpointing(*hooks.stateful())
    store = Checkpoints(checkpoint_dir, accelerator) if checkpoint_dir else None
    start = store.load() if store and resume else 0
    log, began, running = TrainLog(steps=start), time.perf_counter(), 0.0
    bar = tqdm(
        total=total, initial=start, desc=label, unit="step", disable=None if accelerator.is_main_process else True
    )
    times: list[float] = []
    summed = 0
    batches = _epochs(loader, per_epoch, start, accelerator.device)
    with StopOnSignal(active=store is not None) as stop, bar:
        for step in range(start, total):
            epoch, index, batch = next(batches)
            step_began = time.perf_counter()
            for group in opt.param_groups:
                group["lr"] = group["initial_lr"] * _cosine(step, total)
            hooks.begin_step(model, step, total)
            loss = _backward(accelerator, wrapped, hooks, batch, random.Random(f"{seed}:{step}"), opt)
            if not math.isfinite(loss):
                raise TrainingDiverged(step, loss, store.last if store else None)
            hooks.before_step(model, step)
            params = [p for g in opt.param_groups for p in g["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_value_(params, CLIP_VALUE)
            opt.step()
            opt.zero_grad(set_to_none=True)
            hooks.after_step(model, step)
            times.append(time.perf_counter() - step_began)
            running, summed = running + loss, summed + 1
            log.steps, log.samples = step + 1, log.samples + size_of(batch)
            rate = log.samples * accelerator.num_processes / (time.perf_counter() - began)
            bar.set_postfix(loss=f"{loss / hooks.passes:.4f}", rate=f"{rate:.1f} samples/s", refresh=False)
            bar.update()
            if index + 1 == per_epoch or step + 1 == total:
                log.epoch_loss.append(running / (summed * hooks.passes))
                running, summed = 0.0, 0
                if hooks.after_epoch(model, epoch):
                    _renew(opt, hooks.parameter_groups(model))
            due = (step + 1) % checkpoint_every == 0 and step + 1 < total
            if store and (stop.raised or due):
                if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
                    raise TrainingDiverged(step, math.nan, store.last)  # the next loss would say so, too late
                store.save(step + 1)
            if stop.raised:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; resume from {store.last if store else None}")
    log.seconds, log.step_seconds = time.perf_counter() - began, statistics.median(times or [0.0])
    model.eval()
    return log


def _backward(
    accelerator: Any, model: nn.Module, hooks: Hooks, batch: Any, rng: random.Random, opt: torch.optim.Optimizer
) -> float:
    """All passes of one step; returns the sum of their losses. One graph is alive at a time."""
    generator, total = hooks.losses(model, batch, rng), torch.zeros((), device=accelerator.device)
    for i in range(hooks.passes):
        # the all-reduce of a DDP model runs once, in the last pass
        last = i + 1 == hooks.passes
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss, group = next(generator)
            names = (group,) if isinstance(group, str) else group
            inputs = None if names is None else [p for g in opt.param_groups if g["name"] in names for p in g["params"]]
            accelerator.backward(loss, inputs=inputs)
        total += loss.detach()
    return float(total)


def make_accelerator(*, seed: int = 0, cpu: bool | None = None) -> Any:
    """Accelerator that shuffles by `seed` and epoch, whatever the global seed is, so that a run can be repeated and
    resumed. `cpu` None: a GPU when there is one."""
    from accelerate import Accelerator, DataLoaderConfiguration

    return Accelerator(
        cpu=bool(cpu), dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
    )
