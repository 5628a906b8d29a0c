"""The training loop, based on Accelerate."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import Engine
from ..errors import HubMPQError, InvalidArgument, TrainingDiverged
from ..versions import warn_if_untested
from .batches import Fed, batches_per_epoch, feed, has_length, prepared, set_epoch
from .checkpoint import Checkpoints, StopOnSignal
from .engine import accelerator_of, applied, autocast, check, placed
from .hooks import Hooks
from .norms import single_values_allowed
from .processes import agreed, total
from .shard import Spread
from .track import Tracks

CLIP_VALUE = 1.0  # LIMPQ's authors clip every gradient element


@dataclass
class TrainLog:
    """Log of a training, returned by `fit` and `finetune`.

    Attributes:
        steps: Optimizer steps, including those before an interruption.
        samples: Samples of all processes, including those before an interruption.
        seconds: Wall time of this process, since it started or resumed.
        step_seconds: Median time of a step of this process, since it started or resumed.
        epoch_loss: Mean loss of each epoch, including those before an interruption.
        part: Losses of the steps of the unfinished epoch.

    Example:
        >>> from hub_mpq.train import TrainLog
        >>> TrainLog(steps=2, samples=64, epoch_loss=[0.7]).state_dict()
        {'samples': 64, 'epoch_loss': [0.7], 'part': []}
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    epoch_loss: list[float] = field(default_factory=list)
    part: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold.

        Returns:
            `samples`, `epoch_loss` and `part`.
        """
        return {"samples": self.samples, "epoch_loss": self.epoch_loss, "part": self.part}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the log from a checkpoint.

        Args:
            state: What `state_dict` returned.
        """
        self.samples, self.epoch_loss, self.part = state["samples"], list(state["epoch_loss"]), list(state["part"])


def _optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    groups = [{**g, "initial_lr": g["lr"]} for g in groups if g["params"]]
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    if name == "adam":
        return torch.optim.AdamW(groups, weight_decay=0.0)
    raise InvalidArgument(f"optimizer must be 'adam' or 'sgd', got {name!r}")


def _renew(opt: Any, groups: list[dict[str, Any]]) -> None:
    """Replace the groups of an optimizer. A new optimizer would be saved in addition, which breaks resuming."""
    inner = opt.optimizer
    inner.state.clear()
    inner.param_groups.clear()
    for group in groups:
        if group["params"]:
            inner.add_param_group({**group, "initial_lr": group["lr"]})


def _cosine(step: int, total: int) -> float:
    """Return the learning-rate factor, from 1 to 0.001 (LIMPQ: 0.01 to 1e-5)."""
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))


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
    engine: Engine | None = None,
) -> TrainLog:
    """Train a model in place, with a cosine schedule and gradients clipped by value.

    If several processes were launched, each takes its part of the batches, so the effective batch size is multiplied by
    the number of processes.

    Args:
        model: The model to train.
        hooks: Losses, optimizer groups and callbacks.
        loader: Batches.
        epochs: Length in epochs.
        steps: Length in optimizer steps; overrides `epochs`. Required for a stream without a length.
        share: Fraction of each epoch's batches that is used, above 0 and at most 1.
        optimizer: "adam" (AdamW) or "sgd" (momentum 0.9).
        seed: Seed of shuffling and of the hooks' random numbers.
        checkpoint_dir: Folder for resumable checkpoints, written every `checkpoint_every` steps and on SIGINT or
            SIGTERM. All processes must have access to it. None writes none.
        checkpoint_every: Steps between checkpoints.
        resume: Resume from the newest checkpoint.
        label: Name of the training in progress bars and logs.
        accelerator: An `Accelerator` to use; None to create one.
        engine: Precision, memory, compiler, trackers.

    Returns:
        Steps, samples, seconds and losses.

    Raises:
        TrainingDiverged: The loss, or at a checkpoint a parameter, is NaN or infinite.
        InvalidArgument: There are no data, or a value is out of range.
        KeyboardInterrupt: SIGINT or SIGTERM stopped the training after a checkpoint.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import Classification
        >>> from hub_mpq.train import Finetune, fit
        >>> hooks = Finetune(task=Classification(), lr=1e-2, scale_lr=1e-3, weight_decay=0.0, smoothing=0.0)
        >>> log = fit(torch.nn.Linear(4, 2), hooks, [(torch.eye(4), torch.tensor([0, 1, 0, 1]))], epochs=2)
        >>> log.steps, log.samples, len(log.epoch_loss)
        (2, 8, 2)
    """
    from huggingface_hub.utils import tqdm

    warn_if_untested("accelerate")
    engine = Engine.of(engine)
    accelerator = accelerator or accelerator_of(engine, label, seed=seed)
    check(engine, accelerator)
    hooks.check_processes(accelerator.num_processes)
    loader = prepared(loader, accelerator)
    per_epoch = steps if steps and not has_length(loader) else batches_per_epoch(loader, share)
    length = steps if steps is not None else math.ceil(min(per_epoch * epochs, 2.0**53))
    model.train()
    log, times = TrainLog(), []
    with contextlib.ExitStack() as stack:
        # what reads the loader next, such as calibration, must not depend on whether this process trained or resumed
        stack.callback(set_epoch, loader, 0)
        stack.enter_context(applied(engine, model))
        stack.enter_context(single_values_allowed(model))
        spread = Spread(model, accelerator, sharded=engine.fsdp)
        stack.callback(spread.release)
        opt = spread.prepare(_optimizer(optimizer, hooks.parameter_groups(model)))
        accelerator.register_for_checkpointing(*hooks.stateful(), log)
        store = Checkpoints(checkpoint_dir, accelerator, per_epoch=per_epoch, spread=spread) if checkpoint_dir else None
        start = log.steps = store.load() if store and resume else 0
        began = time.perf_counter()
        tracks = stack.enter_context(Tracks(accelerator, engine.log_with, engine.log_every, label, hooks.pass_names()))
        bar = tqdm(
            total=length, initial=start, desc=label, unit="step", disable=None if accelerator.is_main_process else True
        )
        stop = stack.enter_context(StopOnSignal(active=store is not None))
        stack.enter_context(bar)
        batches = feed(loader, per_epoch, start, accelerator.device, hooks)
        seen = 0
        for step in range(start, length):
            fed = next(batches)
            step_began = time.perf_counter()
            for group in opt.param_groups:
                group["lr"] = group["initial_lr"] * _cosine(step, length)
            hooks.begin_step(model, step, length)
            losses = _backward(accelerator, engine, spread.wrapped, hooks, fed, random.Random(f"{seed}:{step}"), opt)
            *losses, stopping = total(*losses, stop.raised)
            loss = sum(losses)
            if not math.isfinite(loss):
                raise agreed(TrainingDiverged(step, loss, store.last if store else None))
            spread.average_replicated()
            hooks.before_step(model, step)
            spread.clip(CLIP_VALUE)
            opt.step()
            opt.zero_grad(set_to_none=True)
            hooks.after_step(model, step)
            times.append(time.perf_counter() - step_began)
            log.part.append(loss / hooks.passes)
            log.steps, log.samples, seen = step + 1, log.samples + fed.samples, seen + fed.samples
            rate = seen / (time.perf_counter() - began)
            bar.set_postfix(loss=f"{loss / hooks.passes:.4f}", rate=f"{rate:.1f} samples/s", refresh=False)
            bar.update()
            lr = opt.param_groups[0]["lr"]
            tracks.log(step + 1, losses, rate, lr, lambda: hooks.watch(model), last=step + 1 == length)
            if fed.index + 1 == per_epoch or step + 1 == length:
                log.epoch_loss.append(sum(log.part) / len(log.part))
                log.part.clear()
                if hooks.after_epoch(model, fed.epoch):
                    _renew(opt, hooks.parameter_groups(model))
            stopping = stopping or (stop.raised and accelerator.num_processes == 1)
            due = (step + 1) % checkpoint_every == 0 and step + 1 < length
            if store and (stopping or due):
                if not spread.finite():
                    # the next loss would show it too late
                    raise agreed(TrainingDiverged(step, math.nan, store.last))
                store.save(step + 1)
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; resume from {store.last if store else None}")
    log.seconds, log.step_seconds = time.perf_counter() - began, statistics.median(times or [0.0])
    model.eval()
    return log


def _backward(
    accelerator: Any,
    engine: Engine,
    model: nn.Module,
    hooks: Hooks,
    fed: Fed,
    rng: random.Random,
    opt: torch.optim.Optimizer,
) -> list[float]:
    """Run all passes of one step, one graph at a time; return this process's part of the mean loss of each."""
    generator, losses = hooks.losses(model, placed(engine, fed.batch), rng), []
    processes = accelerator.num_processes
    for i in range(hooks.passes):
        # the all-reduce of a DDP model runs once, in the last pass
        last = i + 1 == hooks.passes
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with autocast(engine, accelerator):
                loss, group = next(generator)
            if processes > 1:
                if group is not None:
                    raise agreed(
                        HubMPQError("strategies that train parts of their parameters in turn must run in one process")
                    )
                loss = loss * fed.weight  # DDP takes the plain mean over the processes
            names = (group,) if isinstance(group, str) else group
            inputs = None if names is None else [p for g in opt.param_groups if g["name"] in names for p in g["params"]]
            accelerator.backward(loss, inputs=inputs)
        losses.append(loss.detach() / processes)
    return [float(value) for value in torch.stack([x.reshape(()) for x in losses]).tolist()]
