"""Any number of labels a sample, each of them yes or no."""

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
    """Binary cross-entropy of every label. Labels have the shape of the logits (an axis of one class may be missing):
    0, 1 or a probability between; `ignore_index` marks labels that are unknown."""

    name = "multi-label"

    def placed(self, labels: Any, logits: Tensor) -> Tensor:
        """Labels in the shape of the logits. Raises InvalidArgument when they do not fit or are no yes or no."""
        labels = reshaped(labels, logits, self.name).float()
        known = labels[labels != self.ignore_index]
        if known.numel() and not 0 <= float(known.min()) <= float(known.max()) <= 1:
            raise InvalidArgument(
                f"labels of task 'multi-label' are 0 or 1 (or {self.ignore_index}, unknown), and here one is "
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
        """KL divergence of every label's two outcomes."""
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
    """Labels in the shape of an output: an axis of one element may be missing or too many, and nothing else.

    Raises:
        InvalidArgument: Other shapes, which would be broadcast to something else.
    """
    if isinstance(labels, Tensor):
        if labels.shape == output.shape:
            return labels
        if labels.shape[:1] == output.shape[:1] and squeezed(labels.shape) == squeezed(output.shape):
            return labels.reshape(output.shape)
    raise misfit(task, labels, output)


register_task(MultiLabel())
