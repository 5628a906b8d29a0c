"""One model over several processes: a copy in each (Accelerate's DDP), or its parameters in parts (torch's FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HubMPQError
from ..quantizers import LSQ
from .processes import total, world


class Spread:
    """The model as the processes train it, `wrapped`, and its optimizer.

    sharded: every block (a child of a ModuleList or Sequential) and the rest go through `fully_shard`, in place. Scales
    are left out: they are few and every process needs all of them. Nobody reduces the gradients of parameters that FSDP
    leaves out: `average_replicated` does.
    """

    def __init__(self, model: nn.Module, accelerator: Any, *, sharded: bool) -> None:
        self.model, self.accelerator, self.sharded = model, accelerator, sharded
        self.replicated = shard(model, accelerator.device) if sharded else []
        self.wrapped: Any = model
        self.own_forward = "forward" in model.__dict__

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer as Accelerate steps it; sets `wrapped`."""
        self.optimizer = optimizer
        if self.sharded:  # Accelerate's own states would hold the main process's part only
            return optimizer
        self.wrapped, prepared = self.accelerator.prepare(self.model, optimizer)
        return prepared

    def release(self) -> None:
        """Give the model back without what Accelerate put around its forward (autocast, when launched with bf16)."""
        if self.wrapped is not self.model or self.accelerator.mixed_precision != "no":
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            if not self.own_forward:
                self.model.__dict__.pop("forward", None)

    def clip(self, limit: float) -> None:
        """Clip every gradient element. Sharded and whole tensors cannot be in one call."""
        whole = {id(p) for p in self.replicated}
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        for part in ([p for p in params if id(p) not in whole], [p for p in params if id(p) in whole]):
            if part:
                torch.nn.utils.clip_grad_value_(part, limit)

    def save(self, folder: Path) -> None:
        """What Accelerate does not save: every process's part of a sharded model and of its optimizer."""
        if self.sharded:
            from torch.distributed.checkpoint import save
            from torch.distributed.checkpoint.state_dict import get_state_dict

            model, optimizer = get_state_dict(self.model, self.optimizer)
            save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "parts")

    def load(self, folder: Path) -> None:
        """What `save` saved."""
        if self.sharded:
            from torch.distributed.checkpoint import load
            from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

            model, optimizer = get_state_dict(self.model, self.optimizer)
            found = {"model": model, "optimizer": optimizer}
            load(found, checkpoint_id=folder / "parts")
            set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=found["optimizer"])

    def average_replicated(self) -> None:
        """One all-reduce for the gradients that FSDP left out."""
        with_grad = [p for p in self.replicated if p.grad is not None]
        if not with_grad:
            return
        flat = torch.cat([p.grad.flatten() for p in with_grad])
        torch.distributed.all_reduce(flat)
        for parameter, mean in zip(with_grad, flat.split([p.numel() for p in with_grad]), strict=True):
            parameter.grad.copy_(mean.view_as(parameter.grad) / world()[1])

    def finite(self) -> bool:
        """Whether all parameters are, in all processes."""
        bad = any(not bool(torch.isfinite(local(p)).all()) for p in self.model.parameters())
        return total(bad)[0] == 0


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The outermost children of lists of modules that have parameters: what is gathered together."""
    for child in model.children():
        if isinstance(model, (nn.ModuleList, nn.Sequential)):
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from blocks(child)


def shard(model: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Shard a model in place; returns the parameters that stayed whole, equal in all processes from then on.

    Raises HubMPQError when nothing was sharded: FSDP that is asked for and not active is a mistake.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    if world()[1] == 1:
        raise HubMPQError("FSDP was asked for and there is one process: nothing would be sharded")
    scales = [m.shift for m in model.modules() if isinstance(m, LSQ)]
    mesh = torch.distributed.init_device_mesh(device.type, (world()[1],))
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.detach(), 0)
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh, ignored_params=set(scales))
    # whoever swaps or caches parameters would undo it without a word
    kept = {id(p) for p in scales}
    if whole := [n for n, p in model.named_parameters() if id(p) not in kept and not isinstance(p, DTensor)]:
        raise HubMPQError(f"FSDP was asked for and is not active: {whole[0]} and {len(whole) - 1} more are not sharded")
    return scales
