"""One model in several processes: replicated (Accelerate's DDP), or with sharded parameters (torch's FSDP2)."""

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

    Args:
        model: The model.
        accelerator: The accelerator of the training.
        sharded: Whether to apply `fully_shard`, in place, to every block (a child of a ModuleList or Sequential) and to
            the rest. The scales are excluded, because they are few and every process needs all of them. FSDP does not
            reduce their gradients; `average_replicated` does.
    """

    def __init__(self, model: nn.Module, accelerator: Any, *, sharded: bool) -> None:
        self.model, self.accelerator, self.sharded = model, accelerator, sharded
        self.replicated = shard(model, accelerator.device) if sharded else []
        self.wrapped: Any = model
        self.own_forward = "forward" in model.__dict__

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """Prepare the optimizer and the model for Accelerate; sets `wrapped`."""
        self.optimizer = optimizer
        if self.sharded:  # Accelerate's checkpoints would hold the main process's part only
            return optimizer
        self.wrapped, prepared = self.accelerator.prepare(self.model, optimizer)
        return prepared

    def release(self) -> None:
        """Remove what Accelerate wrapped around the forward of the model (autocast, when launched with bf16)."""
        if self.wrapped is not self.model or self.accelerator.mixed_precision != "no":
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            if not self.own_forward:
                self.model.__dict__.pop("forward", None)

    def clip(self, limit: float) -> None:
        """Clip every gradient element; sharded and whole tensors need separate calls."""
        whole = {id(p) for p in self.replicated}
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        for part in ([p for p in params if id(p) not in whole], [p for p in params if id(p) in whole]):
            if part:
                torch.nn.utils.clip_grad_value_(part, limit)

    def save(self, folder: Path) -> None:
        """Save what Accelerate does not: every process's part of a sharded model and of its optimizer."""
        if self.sharded:
            from torch.distributed.checkpoint import save
            from torch.distributed.checkpoint.state_dict import get_state_dict

            model, optimizer = get_state_dict(self.model, self.optimizer)
            save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "parts")

    def load(self, folder: Path) -> None:
        """Load what `save` has saved."""
        if self.sharded:
            from torch.distributed.checkpoint import load
            from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

            model, optimizer = get_state_dict(self.model, self.optimizer)
            found = {"model": model, "optimizer": optimizer}
            load(found, checkpoint_id=folder / "parts")
            set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=found["optimizer"])

    def average_replicated(self) -> None:
        """Average the gradients that FSDP does not reduce, by one all-reduce."""
        with_grad = [p for p in self.replicated if p.grad is not None]
        if not with_grad:
            return
        flat = torch.cat([p.grad.flatten() for p in with_grad])
        torch.distributed.all_reduce(flat)
        for parameter, mean in zip(with_grad, flat.split([p.numel() for p in with_grad]), strict=True):
            parameter.grad.copy_(mean.view_as(parameter.grad) / world()[1])

    def finite(self) -> bool:
        """Whether all parameters are finite, in all processes."""
        bad = any(not bool(torch.isfinite(local(p)).all()) for p in self.model.parameters())
        return total(bad)[0] == 0


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def blocks(model: nn.Module) -> Iterable[nn.Module]:
    """Yield the outermost children, with parameters, of lists of modules; each is gathered as one unit."""
    for child in model.children():
        if isinstance(model, (nn.ModuleList, nn.Sequential)):
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from blocks(child)


def shard(model: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Shard a model in place.

    Returns:
        The parameters that are not sharded, which are now equal in all processes.

    Raises:
        HubMPQError: FSDP has no effect, because there is one process or a parameter was not sharded.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    if world()[1] == 1:
        raise HubMPQError("fsdp needs several processes, got 1")
    scales = [m.shift for m in model.modules() if isinstance(m, LSQ)]
    mesh = torch.distributed.init_device_mesh(device.type, (world()[1],))
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.detach(), 0)
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh, ignored_params=set(scales))
    # code that swaps or caches parameters would silently undo it
    kept = {id(p) for p in scales}
    if whole := [n for n, p in model.named_parameters() if id(p) not in kept and not isinstance(p, DTensor)]:
        raise HubMPQError(
            f"fsdp did not shard {whole[0]} and {len(whole) - 1} more parameters; train this model without it"
        )
    return scales
