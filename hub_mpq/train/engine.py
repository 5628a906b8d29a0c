"""How a training runs, apart from what it computes: precision, memory, layout, compiler, processes, trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import HubMPQError, InvalidArgument
from ..nn.banks import rebased
from ..quantizers import LSQ, compile_quantizers
from .processes import make_accelerator, world
from .track import tracker


@dataclass(frozen=True)
class Engine:
    """Options of `fit`; each leaves what is computed as it is, within the tolerance named.

    bf16: autocast to bfloat16 (8 bits of mantissa: losses within about 1 %); weights, scales and their gradients stay
    float32.
    gradient_checkpointing: activations are computed again in the backward pass, for models that have transformers' or
    timm's switch; the same gradients, less memory, about one more forward; a BatchNorm sees each batch twice, so that
    its running statistics, and indicators read with them after a short run, differ.
    channels_last: memory order of convolutions, faster on GPUs with bf16.
    compile: large tensors are quantized by torch.compile's kernels, within 1e-6. Not the whole model: widths change
    from pass to pass, and every change would compile anew. The first use on a machine takes 10 to 20 s.
    sync_batch_norm: statistics over all processes' batches (CUDA only); else each process normalises with its own batch
    and the running statistics are the main one's.
    fsdp: parameters sharded over the processes by torch's fully_shard; scales stay whole everywhere and their gradients
    are averaged. For indicators.
    log_with: a tracker of Accelerate's by name ("tensorboard", "wandb", …), "jsonl" (lines in log_dir/<stage>.jsonl),
    or a GeneralTracker, which is yours to finish; log_every: steps between entries.
    """

    bf16: bool = False
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    sync_batch_norm: bool = False
    fsdp: bool = False
    log_with: Any = None
    log_dir: str | Path | None = None
    log_every: int = 10

    def check(self, accelerator: Any) -> None:
        """Raise HubMPQError or InvalidArgument for what this machine or launch cannot do."""
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise InvalidArgument(
                f"mixed precision {accelerator.mixed_precision!r} needs a scaled loss, which gradients clipped by "
                "value do not allow; use bf16"
            )
        if self.sync_batch_norm and world()[1] > 1 and accelerator.device.type != "cuda":
            raise InvalidArgument(f"SyncBatchNorm runs on CUDA only, not on {accelerator.device.type}")
        if self.fsdp and world()[1] == 1:
            raise HubMPQError("FSDP was asked for and there is one process: nothing would be sharded; see the README")

    def accelerator(self, label: str, *, seed: int = 0) -> Any:
        """The accelerator of a training, with its tracker."""
        made = tracker(self.log_with, self.log_dir, label)
        return make_accelerator(seed=seed, log_with=made, log_dir=self.log_dir)

    def autocast(self, accelerator: Any) -> Any:
        """The context of every forward pass."""
        if not (self.bf16 or accelerator.mixed_precision == "bf16"):
            return contextlib.nullcontext()
        return torch.autocast(accelerator.device.type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with these options on, and as it was afterwards."""
        with contextlib.ExitStack() as undo:
            if self.gradient_checkpointing:
                undo.enter_context(_checkpointed(model))
            if self.sync_batch_norm and world()[1] > 1:
                undo.enter_context(synced_norms(model))
            if self.channels_last:
                model.to(memory_format=torch.channels_last)
                undo.callback(model.to, memory_format=torch.contiguous_format)
            if self.compile:
                undo.enter_context(_compiled(model))
            yield

    def placed(self, batch: Any) -> Any:
        """A batch in the order of memory that the model has."""
        if not self.channels_last:
            return batch
        if isinstance(batch, torch.Tensor):
            return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
        if isinstance(batch, dict):
            return {key: self.placed(value) for key, value in batch.items()}
        return tuple(self.placed(part) for part in batch) if isinstance(batch, (tuple, list)) else batch


@contextlib.contextmanager
def _compiled(model: nn.Module) -> Iterator[None]:
    if not compile_quantizers(model):
        raise HubMPQError("torch.compile builds no kernel here (a CPU needs a C++ compiler); go without compile")
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
        except ValueError as error:  # this architecture has none
            raise InvalidArgument(str(error)) from error
        try:
            yield
        finally:
            getattr(model, f"{kind}_checkpointing_disable")()
        return
    if not hasattr(model, "set_grad_checkpointing"):
        raise InvalidArgument(
            f"{type(model).__name__} has no gradient checkpointing (transformers' gradient_checkpointing_enable or "
            "timm's set_grad_checkpointing)"
        )
    try:
        model.set_grad_checkpointing(True)
    except AssertionError as error:  # timm: this architecture has none
        raise InvalidArgument(f"{type(model).__name__} has no gradient checkpointing") from error
    try:
        yield
    finally:
        model.set_grad_checkpointing(False)


@contextlib.contextmanager
def synced_norms(model: nn.Module) -> Iterator[None]:
    """Every BatchNorm as its synchronized form; parameters, banks and activations stay, so state dicts do too."""
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
