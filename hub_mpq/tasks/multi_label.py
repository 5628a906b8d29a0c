"""Any number of yes-or-no labels per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.task import register_task
from ..errors import InvalidArgument
from .classes import misfit
from .outputs import squeezed
from .task import Sums, Task, total


class MultiLabel(Task):
    """Any number of yes-or-no labels per sample, each with a binary cross-entropy.

    Labels have the shape of the logits (an axis of one class may be missing) and are 0, 1 or a probability. Metrics are
    accuracy and F1 in percent, and the loss.

    Args:
        ignore_index: Marks unknown labels, which are excluded from losses, metrics and counts; None for none.
        label_keys: Keys of labels in a dict; None for `labels`, `label` (plain networks: also `target`, `y`).
        output: Which part of the network's output the labels are for, a key or a position; see `Task`.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import MultiLabel
        >>> MultiLabel().loss(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(0.6931)
    """

    name = "multi-label"

    def placed(self, labels: Any, logits: Tensor) -> Tensor:
        """Labels in the shape of the logits.

        Args:
            labels: As `labels` returned them.
            logits: `[batch, labels]` or any other shape.

        Returns:
            The labels, float32, in the shape of `logits`.

        Raises:
            InvalidArgument: The labels do not fit the logits, or lie outside 0 to 1.
        """
        labels = reshaped(labels, logits, self.name).float()
        known = labels[labels != self.ignore_index]
        if known.numel() and not 0 <= float(known.min()) <= float(known.max()) <= 1:
            raise InvalidArgument(
                f"labels of task 'multi-label' must be 0 or 1 (or {self.ignore_index} if unknown), got "
                f"{float(known.max()) if float(known.max()) > 1 else float(known.min()):g}"
            )
        return labels

    def items(self, batch: Any) -> float:
        labels = self.labels(batch)
        return super().items(batch) if not isinstance(labels, Tensor) else float((labels != self.ignore_index).sum())

    def item_loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        logits = self.head(output).float()
        labels = self.placed(labels, logits)
        counted = labels != self.ignore_index
        wanted = torch.where(counted, labels, torch.zeros_like(labels)) * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none"), counted

    def divergence(self, output: Any, reference: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """KL divergence between the two outcomes of every label."""
        s, t = self.head(output).float(), self.head(reference).detach().float()
        p = t.sigmoid()
        values = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        return self.with_others(values, output, reference, mask), torch.ones_like(values, dtype=torch.bool)

    def sample(self, output: Any, generator: torch.Generator) -> Tensor:
        p = self.head(output).detach().float().sigmoid()
        return torch.bernoulli(p.cpu(), generator=generator).to(p.device)

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        """Accuracy and F1 over all labels, in percent, and the loss."""
        logits = self.head(output)
        wanted = self.placed(labels, logits)
        counted = wanted != self.ignore_index
        said, true = (logits > 0) & counted, (wanted > 0.5) & counted
        hits = total(said & true)
        return {
            "accuracy": (100 * total((said == true) & counted), float(counted.sum())),
            "f1": (200 * hits, total(said) + total(true)),
            **super().metrics(output, labels, samples),
        }

    def fidelity(self, output: Any, reference: Any, mask: Tensor | None = None) -> Sums:
        s, t = self.head(output), self.head(reference)
        values, _ = self.divergence(output, reference)
        same = (s > 0) == (t > 0)
        return {
            **super().fidelity(output, reference, mask),
            "kl": (total(values), float(values.numel())),
            "agreement": (100 * total(same), float(same.numel())),
        }


def reshaped(labels: Any, output: Tensor, task: str) -> Tensor:
    """Labels in the shape of an output, where only axes of one element may be missing or extra.

    Raises:
        InvalidArgument: The shapes differ otherwise and would broadcast silently.
    """
    if isinstance(labels, Tensor):
        if labels.shape == output.shape:
            return labels
        if labels.shape[:1] == output.shape[:1] and squeezed(labels.shape) == squeezed(output.shape):
            return labels.reshape(output.shape)
    raise misfit(task, labels, output)


register_task(MultiLabel())
