"""What a batch may be: (inputs, labels), a dict as Hugging Face models take it, or inputs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidArgument


def forward(model: nn.Module, batch: Any, *, labels: bool = False) -> Any:
    """The model's own output on a batch. `labels`: pass a dict's labels on, so that a HF model computes its loss."""
    if isinstance(batch, Mapping):
        return model(**{k: v for k, v in batch.items() if labels or k not in ("labels", "label")})
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(batch)


def labels_of(batch: Any) -> Tensor | None:
    """Labels of a batch, None when it has none."""
    if isinstance(batch, Mapping):
        return batch.get("labels", batch.get("label"))
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def logits_of(output: Any) -> Tensor:
    """The tensor of an output to compare with others: logits, else the last hidden state, else the first tensor."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise InvalidArgument(f"the model's output of type {type(output).__name__} holds no tensor to compute a loss on")


def size_of(batch: Any) -> int:
    """Samples in a batch, or in the two batches of a pair."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
    first = first[0] if isinstance(first, (tuple, list)) else first
    if isinstance(first, (tuple, list, Mapping)):
        return sum(size_of(part) for part in batch)
    return int(first.shape[0]) if isinstance(first, Tensor) and first.dim() else 1


def task_loss(model: nn.Module, batch: Any, smoothing: float = 0.0) -> tuple[Tensor, Any]:
    """(loss, output): the HF model's own loss when a dict has labels, else cross-entropy.

    Raises InvalidArgument when the batch has no labels or they do not fit the model's classes.
    """
    labels = labels_of(batch)
    if labels is None:
        raise InvalidArgument("the batches have no labels; give (inputs, labels), a dict with 'labels', or distill")
    output = forward(model, batch, labels=True)
    if getattr(output, "loss", None) is not None:
        return output.loss, output
    logits = logits_of(output)
    if not labels.is_floating_point():
        top = int(labels.max()) if labels.numel() else 0
        if logits.dim() != labels.dim() + 1 or top >= logits.shape[-1]:
            raise InvalidArgument(
                f"labels of shape {tuple(labels.shape)} up to {top} do not fit logits of shape {tuple(logits.shape)}"
            )
        logits, labels = logits.flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), output


def holds_classes(output: Any, labels: Tensor | None) -> bool:
    """Whether an output is known to hold logits of two classes or more: a Hugging Face head says so, or labels of whole
    numbers. A bare tensor may hold anything, and a single number has no classes."""
    logits = logits_of(output)
    known = getattr(output, "logits", None) is not None or (labels is not None and not labels.is_floating_point())
    return known and logits.dim() > 1 and logits.shape[-1] > 1


def distillation_loss(student: Any, teacher: Any, *, classes: bool) -> Tensor:
    """How far an output is from the float model's: KL divergence when it is known to hold class logits, else the
    squared error relative to the teacher's power."""
    s, t = logits_of(student).float(), logits_of(teacher).float()
    if classes:
        s, t = s.flatten(0, -2), t.flatten(0, -2)
        return F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), reduction="batchmean", log_target=True)
    return (s - t).square().mean() / t.square().mean().clamp_min(1e-12)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(v, device) for v in batch)
    return batch
