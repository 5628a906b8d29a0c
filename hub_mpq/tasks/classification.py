"""One class per sample: images, sequences, sounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.task import register_task
from ..errors import InvalidArgument
from .classes import Classes
from .task import Sums, total


class Classification(Classes):
    """One class per sample, of images, sequences or sounds.

    Labels are class indices `[batch]` or `[batch, 1]`, or probabilities `[batch, classes]` as mixup produces. Metrics
    are top-1 and top-5 accuracy in percent, and the loss.

    Args:
        ignore_index: Label that is excluded from losses, metrics and counts; None for none.
        label_keys: Keys of labels in a dict; None for `labels`, `label` (plain networks: also `target`, `y`).
        output: Which part of the network's output the labels are for, a key or a position; see `Task`.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import Classification
        >>> task = Classification()
        >>> logits, labels = torch.eye(5)[:2], torch.tensor([0, 1])
        >>> task.figures(task.metrics(logits, labels, samples=2))["top1"]
        100.0
    """

    name = "classification"
    smoothing = 0.1

    def aligned(self, labels: Any, logits: Tensor) -> Tensor:
        if isinstance(labels, Tensor) and labels.dim() == logits.dim() and labels.shape[-1] == 1 < logits.shape[-1]:
            labels = labels.squeeze(-1)
        return super().aligned(labels, logits)

    def item_loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        logits = self.logits(output)
        if not self._soft(labels, logits):
            return super().item_loss(output, labels, smoothing)
        loss = F.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(0, -2).float(),
            reduction="none",
            label_smoothing=smoothing,
        )
        values = loss.view(logits.shape[:-1])
        return values, torch.ones_like(values, dtype=torch.bool)

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        """Top-1 and top-5 in percent, and the loss. With soft labels, the likeliest class counts as correct."""
        logits = self.logits(output).float()
        values, _ = self.item_loss(output, labels)
        classes = labels.float().argmax(-1) if self._soft(labels, logits) else self.aligned(labels, logits)
        counted = self.counted(classes)
        ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == classes[..., None]
        kept = float(counted.sum())
        return {
            "top1": (100 * total(ranked[..., 0] & counted), kept),
            "top5": (100 * total(ranked.any(-1) & counted), kept),
            "loss": (total(torch.where(counted, values, torch.zeros_like(values))), kept),
        }

    @staticmethod
    def _soft(labels: Any, logits: Tensor) -> bool:
        """Whether labels are probabilities of all classes. Raises InvalidArgument if a row does not sum to one."""
        if not isinstance(labels, Tensor) or labels.shape != logits.shape or logits.shape[-1] < 2:
            return False
        rows = labels.double().sum(-1)
        if bool((labels < 0).any()) or bool(((rows - 1).abs() > 1e-2).any()):
            raise InvalidArgument(
                "labels of shape [batch, classes] must be probabilities whose rows sum to one in task "
                "'classification'; for several labels per sample use task='multi-label'"
            )
        return True


register_task(Classification())
