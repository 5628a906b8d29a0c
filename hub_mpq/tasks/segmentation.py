"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.task import register_task
from .classes import Classes, misfit
from .task import Sums, T


class Segmentation(Classes):
    """Semantic segmentation: a class for every pixel.

    Logits are `[batch, classes, height, width]`, labels `[batch, height, width]` or `[batch, 1, height, width]`. Logits
    of another size are resized to the labels' bilinearly, as in transformers. Metrics are mean IoU and accuracy in
    percent, and the loss.

    Args:
        ignore_index: Label that is excluded from losses, metrics and counts; None for none. At the default, a
            transformers model's `semantic_loss_ignore_index` takes precedence.
        label_keys: Keys of labels in a dict; None for `labels`, `label` (plain networks: also `target`, `y`).
        output: Which part of the network's output the labels are for, a key or a position; see `Task`.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import Segmentation
        >>> task = Segmentation()
        >>> logits = torch.stack([torch.ones(1, 4, 4), torch.zeros(1, 4, 4)], 1)
        >>> task.figures(task.metrics(logits, torch.zeros(1, 4, 4, dtype=torch.long), samples=1))["mean_iou"]
        100.0
    """

    name = "segmentation"
    positional = True

    def bind(self: T, model: nn.Module, example: Any = None) -> T:
        out = super().bind(model, example)
        chosen = getattr(getattr(model, "config", None), "semantic_loss_ignore_index", None)
        if isinstance(chosen, int) and out.ignore_index == -100:  # type: ignore[attr-defined]
            out.ignore_index = chosen  # type: ignore[attr-defined]
        return out

    def logits(self, output: Any) -> Tensor:
        return self.head(output).movedim(1, -1)

    def fitted(self, output: Any, labels: Any) -> Tensor:
        maps = self.head(output)
        if not isinstance(labels, Tensor) or labels.dim() not in (maps.dim(), maps.dim() - 1):
            raise misfit(self.name, labels, maps)
        size = labels.shape[-(maps.dim() - 2) :]
        if maps.shape[2:] != size and maps.dim() == 4:
            maps = F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)
        return maps.movedim(1, -1)

    def aligned(self, labels: Any, logits: Tensor) -> Tensor:
        if isinstance(labels, Tensor) and labels.dim() == logits.dim() and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        return super().aligned(labels, logits)

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        """Pixel accuracy and, per class, intersection over union, in percent, and the loss."""
        logits = self.fitted(output, labels)
        wanted = self.aligned(labels, logits)
        counted = wanted != self.ignore_index
        classes = logits.shape[-1]
        pairs = wanted[counted] * classes + logits.argmax(-1)[counted]
        table = torch.bincount(pairs, minlength=classes * classes).view(classes, classes).double()
        hits, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
        sums = super().metrics(output, labels, samples)
        rows = zip(hits.tolist(), union.tolist(), strict=True)
        return {**sums, **{f"_iou/{c}": (100 * hit, whole) for c, (hit, whole) in enumerate(rows)}}

    def figures(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        found = super().figures(sums)
        each = [found.pop(name) for name in list(found) if name.startswith("_iou/")]
        return {**({"mean_iou": sum(each) / len(each)} if each else {}), **found}


register_task(Segmentation())
