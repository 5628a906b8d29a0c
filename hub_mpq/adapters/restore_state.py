"""Run a model without changing its state, and copy it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def state_restored(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on exit, modes, buffers, caches, attributes and random state are restored.

    Some forwards write to their modules: caches keyed by device (LeViT), counters, rescaled rotary frequencies.
    """
    saved = [(module, _contents(module)) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.no_grad():
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer runs without its modules
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, contents in saved:
                _restore(module, contents)
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)


def copied(model: nn.Module, shared: Iterable[nn.Parameter] = ()) -> nn.Module:
    """A deep copy of a model, including tensors with a gradient history, which torch does not copy.

    Such tensors are weights that a hook recomputes before each forward (weight_norm, spectral_norm, prune), and outputs
    that a forward in training has stored.

    Args:
        model: The model.
        shared: Parameters whose memory the copy shares; their values must not change.
    """
    memo = {id(value): value.detach().clone() for value in _tensors(model) if not value.is_leaf}
    memo |= {id(value): type(value)(value.data, value.requires_grad) for value in shared}
    return copy.deepcopy(model, memo)


def copied_structure(model: nn.Module) -> nn.Module:
    """A copy of a model's modules around the same Parameters and buffers, whose layers can be replaced.

    Args:
        model: The model.
    """
    return copy.deepcopy(model, {id(value): value for value in _tensors(model)})


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module holds: Parameters, buffers, attributes."""
    for module in model.modules():
        for held in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(held, Tensor):
                yield held


def _contents(module: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    return {k: (v, dict(v) if isinstance(v, dict) else None) for k, v in module.__dict__.items()}


def _restore(module: nn.Module, contents: dict[str, tuple[Any, dict[Any, Any] | None]]) -> None:
    own = module.__dict__
    for key in own.keys() - contents.keys():
        del own[key]
    for key, (value, items) in contents.items():
        own[key] = value
        if items is not None and list(map(id, value.values())) != list(map(id, items.values())):
            value.clear()
            value.update(items)
