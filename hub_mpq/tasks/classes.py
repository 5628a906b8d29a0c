"""Base of all tasks whose output is a distribution over classes for every sample, token or pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InvalidArgument
from .task import Sums, Task, total

_AT_ONCE = 1 << 20  # logits whose divergence is computed at a time


class Classes(Task):
    """Cross-entropy over the last axis of the logits; KL divergence from the float model's distribution.

    Subclasses bring logits and labels into matching shapes in `logits` and `aligned`.
    """

    def logits(self, output: Any) -> Tensor:
        """The logits of an output.

        Args:
            output: What the network returned.

        Returns:
            The logits, `[batch, …, classes]`.
        """
        return self.head(output)

    def fitted(self, output: Any, labels: Any) -> Tensor:
        """The logits, resized to the labels where a task allows other sizes.

        Args:
            output: What the network returned.
            labels: As `labels` returned them.

        Returns:
            The logits, `[batch, …, classes]`.
        """
        return self.logits(output)

    def aligned(self, labels: Any, logits: Tensor) -> Tensor:
        """Labels in the layout of the logits.

        Args:
            labels: As `labels` returned them.
            logits: `[batch, …, classes]`.

        Returns:
            Class indices, `[batch, …]`, int64.

        Raises:
            InvalidArgument: The labels do not fit the logits.
        """
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            raise misfit(self.name, labels, logits)
        wrong = ((labels < 0) | (labels >= logits.shape[-1])) & (labels != self.ignore_index)
        if bool(wrong.any()):
            raise InvalidArgument(
                f"label {int(labels[wrong][0])} is out of range for a model with {logits.shape[-1]} classes; to skip "
                f"items, label them {self.ignore_index} or set ignore_index="
            )
        return labels.long()

    def counted(self, labels: Tensor) -> Tensor:
        """Mask of the labels that count.

        Args:
            labels: Class indices.

        Returns:
            False where a label is `ignore_index`; the shape of `labels`.
        """
        return labels != self.ignore_index

    def items(self, batch: Any) -> float:
        labels = self.labels(batch)
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return super().items(batch)
        return float(self.counted(labels).sum())

    def item_loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        logits = self.fitted(output, labels)
        classes = self.aligned(labels, logits)
        if logits.shape[-1] < 2:
            raise InvalidArgument(
                f"task {self.name!r} needs at least two classes, but the output has one value per item; use "
                "task='multi-label' for a single yes-or-no label, or task='regression'"
            )
        counted = classes != self.ignore_index
        flat, wanted = logits.flatten(0, -2).float(), classes.masked_fill(~counted, 0).flatten()
        loss = F.cross_entropy(flat, wanted, reduction="none")
        if smoothing:
            # classes that the model masks out (with the smallest float, say) get no share of the smoothing
            possible = flat > torch.finfo(logits.dtype).min / 2
            logp = torch.where(possible, F.log_softmax(flat, -1), torch.zeros_like(flat))
            loss = (1 - smoothing) * loss - smoothing * logp.sum(-1) / possible.sum(-1).clamp_min(1)
        return torch.where(counted, loss.view(classes.shape), 0.0), counted

    def divergence(self, output: Any, reference: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s, t = self.logits(output), self.logits(reference).detach()
        if s.shape[-1] < 2:
            return super().divergence(output, reference, mask)
        values = _divergence_of_rows(*(x.reshape(-1, x.shape[-1]) for x in (s, t))).view(s.shape[:-1])
        return self.with_others(values, output, reference, mask), self.places(mask, values)

    def places(self, mask: Tensor | None, values: Tensor) -> Tensor:
        """Mask of the items that count.

        Args:
            mask: Tokens that are not padding, `[batch, tokens]`; None if all count.
            values: One value per item.

        Returns:
            A mask in the shape of `values`: `mask` if the shapes agree, else all True.
        """
        if mask is not None and mask.shape == values.shape:
            return mask.bool()
        return torch.ones_like(values, dtype=torch.bool)

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        logits = self.logits(output).detach()
        if logits.shape[-1] < 2:  # one value per item is not a distribution
            return None
        p = logits.float().softmax(-1).flatten(0, -2).cpu()
        drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
        return drawn.view(logits.shape[:-1]).to(logits.device)

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        logits = self.fitted(output, labels)
        classes, found = self.aligned(labels, logits), super().metrics(output, labels, samples)
        counted = classes != self.ignore_index
        right = (logits.argmax(-1) == classes) & counted
        return {"accuracy": (100 * total(right), float(counted.sum())), **found}

    def fidelity(self, output: Any, reference: Any, mask: Tensor | None = None) -> Sums:
        s, t = self.logits(output), self.logits(reference)
        sums = super().fidelity(output, reference, mask)
        if s.shape[-1] < 2:
            return sums
        values, counted = self.divergence(output, reference, mask)
        same = (s.argmax(-1) == t.argmax(-1)) & counted
        kept = float(counted.sum())
        return {**sums, "kl": (total(values * counted), kept), "agreement": (100 * total(same), kept)}


def _divergence_of_rows(s: Tensor, t: Tensor) -> Tensor:
    """KL divergence of each row of the logits `s` [rows, classes] from that of `t`. Without gradients, rows are
    processed in chunks, because the intermediate tensors take several times the memory of the logits."""
    if torch.is_grad_enabled():
        return _divergence(s, t)
    rows = max(_AT_ONCE // s.shape[-1], 1)
    out = torch.empty(len(s), device=s.device)
    for i in range(0, len(s), rows):
        out[i : i + rows] = _divergence(s[i : i + rows], t[i : i + rows])
    return out


def _divergence(s: Tensor, t: Tensor) -> Tensor:
    logs = F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)
    return F.kl_div(*logs, reduction="none", log_target=True).sum(-1)


def misfit(task: str, labels: Any, output: Tensor) -> InvalidArgument:
    """The error for labels whose shape or type does not fit a task."""
    said = f"of type {type(labels).__name__}"
    if isinstance(labels, Tensor):
        said = f"of shape {tuple(labels.shape)} ({str(labels.dtype).removeprefix('torch.')})"
    return InvalidArgument(f"labels {said} do not fit an output of shape {tuple(output.shape)} in task {task!r}")
