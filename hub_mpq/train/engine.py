"""Apply an `Engine` to a training: precision, memory, layout, compiler, processes, trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..core import Engine
from ..errors import HubMPQError, InvalidArgument
from ..nn.banks import rebased
from ..quantizers import LSQ, compile_quantizers
from .processes import make_accelerator, world
from .track import tracker


def check(engine: Engine, accelerator: Any) -> None:
    """Raise HubMPQError or InvalidArgument if this machine or launch does not support an option."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise InvalidArgument(
            f"mixed precision {accelerator.mixed_precision!r} is not supported, because it scales the loss and "
            "gradients are clipped by value; use bf16"
        )
    if engine.sync_batch_norm and world()[1] > 1 and accelerator.device.type != "cuda":
        raise InvalidArgument(f"sync_batch_norm requires CUDA, got {accelerator.device.type}")
    if engine.fsdp and world()[1] == 1:
        raise HubMPQError("fsdp needs several processes, got 1; start them with torchrun or accelerate launch")


def accelerator_of(engine: Engine, label: str, *, seed: int = 0) -> Any:
    """Create the accelerator of a training, with its tracker."""
    made = tracker(engine.log_with, engine.log_dir, label)
    return make_accelerator(seed=seed, log_with=made, log_dir=engine.log_dir)


def autocast(engine: Engine, accelerator: Any) -> Any:
    """Return the context of every forward pass."""
    if not (engine.bf16 or accelerator.mixed_precision == "bf16"):
        return contextlib.nullcontext()
    return torch.autocast(accelerator.device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def applied(engine: Engine, model: nn.Module) -> Iterator[None]:
    """Apply the options to a model, and undo them afterwards."""
    with contextlib.ExitStack() as undo:
        if engine.gradient_checkpointing:
            undo.enter_context(_checkpointed(model))
        if engine.sync_batch_norm and world()[1] > 1:
            undo.enter_context(synced_norms(model))
        if engine.channels_last:
            model.to(memory_format=torch.channels_last)
            undo.callback(model.to, memory_format=torch.contiguous_format)
        if engine.compile:
            undo.enter_context(_compiled(model))
        yield


def placed(engine: Engine, batch: Any) -> Any:
    """Return a batch in the memory format of the model."""
    if not engine.channels_last:
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    if isinstance(batch, dict):
        return {key: placed(engine, value) for key, value in batch.items()}
    return tuple(placed(engine, part) for part in batch) if isinstance(batch, (tuple, list)) else batch


@contextlib.contextmanager
def _compiled(model: nn.Module) -> Iterator[None]:
    if not compile_quantizers(model):
        raise HubMPQError("torch.compile cannot build kernels here (a CPU needs a C++ compiler); turn compile off")
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, LSQ):
                module.compiled = False


@contextlib.contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    if hasattr(model, "gradient_checkpointing_enable"):
        # transformers 5 renamed the pair
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        try:
            getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        except ValueError as error:  # this architecture does not support it
            raise InvalidArgument(str(error)) from error
        try:
            yield
        finally:
            getattr(model, f"{kind}_checkpointing_disable")()
        return
    if not hasattr(model, "set_grad_checkpointing"):
        raise InvalidArgument(
            f"{type(model).__name__} does not support gradient checkpointing: it has neither transformers' "
            "gradient_checkpointing_enable nor timm's set_grad_checkpointing"
        )
    try:
        model.set_grad_checkpointing(True)
    except AssertionError as error:  # timm: this architecture does not support it
        raise InvalidArgument(f"{type(model).__name__} does not support gradient checkpointing") from error
    try:
        yield
    finally:
        model.set_grad_checkpointing(False)


@contextlib.contextmanager
def synced_norms(model: nn.Module) -> Iterator[None]:
    """Turn every BatchNorm into its synchronized form; parameters, banks and thus state dicts are unchanged."""
    from timm.layers import BatchNormAct2d, SyncBatchNormAct

    forms: dict[type, type] = dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), nn.SyncBatchNorm)
    forms[BatchNormAct2d] = SyncBatchNormAct
    kept: list[tuple[nn.Module, type]] = []
    for module in model.modules():
        synced = rebased(type(module), forms)
        if synced is not None:
            kept.append((module, type(module)))
            module.process_group = None
            module.__class__ = synced
    try:
        yield
    finally:
        for module, cls in kept:
            module.__class__ = cls
            del module.process_group
