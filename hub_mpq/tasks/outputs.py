"""The tensors in a network's output, by name, and the distance between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INNER = frozenset(
    (
        *("loss", "loss_dict", "auxiliary_outputs", "past_key_values"),
        *("hidden_states", "decoder_hidden_states", "encoder_hidden_states"),
        *("attentions", "decoder_attentions", "encoder_attentions", "cross_attentions"),
        *("mems", "router_logits", "image_hidden_states"),
    )
)
"""Fields of a transformers output that are not results: losses, inner states, caches."""


def tensors_in(output: Any, prefix: str = "") -> dict[str, Tensor]:
    """All floating-point tensors of an output, nested in any way.

    Args:
        output: A tensor, a tuple, list, dict or dataclass of outputs, or a transformers output.
        prefix: Prefix of the paths.

    Returns:
        {path: tensor}, with keys of dicts and positions in tuples joined by dots; "output" for a bare tensor.
    """
    if isinstance(output, Tensor):
        return {prefix or "output": output} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        parts = {str(k): v for k, v in output.items() if k not in INNER}
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        parts = dict(zip(output._fields, output, strict=True))
    elif isinstance(output, (tuple, list)):
        parts = {str(i): v for i, v in enumerate(output)}
    elif hasattr(output, "__dataclass_fields__"):
        parts = {k: getattr(output, k) for k in output.__dataclass_fields__ if k not in INNER}
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in parts.items():
        found |= tensors_in(value, f"{prefix}.{key}" if prefix else key)
    return found


def power(reference: Tensor, counted: Tensor | None = None) -> Tensor:
    """The unit for squared errors of a target: its variance, or its mean square if it is constant.

    Args:
        reference: The float model's tensor.
        counted: Mask over its leading axes; None counts everything.
    """
    x = reference.float() if counted is None else reference[counted].float()
    if not x.numel():
        return torch.ones((), device=reference.device)
    square, variance = x.square().mean(), x.var(correction=0)
    found = torch.where(variance > 1e-6 * square, variance, square)
    return torch.where(found > 0, found, torch.ones_like(found))


def leading(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask, if it covers the leading axes of a tensor that has more axes; else None."""
    if mask is None or x.dim() <= mask.dim() or x.shape[: mask.dim()] != mask.shape:
        return None
    return mask.bool()


def squared_error(x: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of every sample, in units of the reference's variance.

    Args:
        x, reference: [batch, …].
        mask: Which positions along the leading axes count, for example [batch, tokens]; None counts all.

    Returns:
        [batch].
    """
    reference = reference.detach()
    error = (x.float() - reference.float()).square()
    counted = leading(mask, error)
    scale = power(reference, counted)
    if error.dim() == 0:
        return (error / scale)[None]
    if counted is None:
        return error.flatten(1).mean(1) / scale if error.dim() > 1 else error / scale
    error = error.flatten(counted.dim()).mean(-1) if error.dim() > counted.dim() else error
    kept = counted.flatten(1).sum(1).clamp_min(1)
    return (error * counted).flatten(1).sum(1) / kept / scale


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the items that count; 0 if none does."""
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum().clamp_min(1)


def squeezed(shape: torch.Size) -> list[int]:
    """The shape of one sample without axes of one element."""
    return [n for n in shape[1:] if n != 1]
