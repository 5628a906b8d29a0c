"""Regression: one or several numbers per sample, or a map of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.task import register_task
from .multi_label import reshaped
from .task import Sums, Task, total


class Regression(Task):
    """Regression of one or several numbers per sample, or of a map, with the squared error.

    Labels have the shape of the output: numbers `[batch]` or `[batch, values]`, or maps `[batch, …]`. NaN marks unknown
    values. Metrics are the mean squared and mean absolute error, R² and Pearson's correlation over all values together.

    Args:
        ignore_index: Marks unknown values in addition to NaN; None for none.
        **options: Further options of `Task`: `label_keys` and `output`.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import Regression
        >>> Regression().loss(torch.zeros(4, 1), torch.tensor([2.0, 2.0, 2.0, float("nan")]))
        tensor(4.)
    """

    name = "regression"

    def __init__(self, *, ignore_index: int | None = None, **options: Any) -> None:
        super().__init__(ignore_index=ignore_index, **options)

    def head(self, output: Any) -> Tensor:
        """The tensor of predictions; for a depth estimator of transformers, its depth.

        Args:
            output: What the network returned.

        Returns:
            The predictions, `[batch, …]`.
        """
        depth = getattr(output, "predicted_depth", None)
        return depth if isinstance(depth, Tensor) and self.output is None else super().head(output)

    def _known(self, labels: Tensor) -> Tensor:
        known = ~labels.isnan()
        return known if self.ignore_index is None else known & (labels != self.ignore_index)

    def items(self, batch: Any) -> float:
        labels = self.labels(batch)
        return super().items(batch) if not isinstance(labels, Tensor) else float(self._known(labels).sum())

    def item_loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        y = self.head(output).float()
        wanted = reshaped(labels, y, self.name).float()
        counted = self._known(wanted)
        return (y - torch.where(counted, wanted, torch.zeros_like(wanted))).square(), counted

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        """Sums for the mean squared and absolute error, R² and Pearson's correlation over all values together."""
        y = self.head(output).double()
        wanted = reshaped(labels, y, self.name).double()
        counted = self._known(wanted)
        y, wanted = y[counted], wanted[counted]
        n = float(counted.sum())
        return {
            "loss": (total((y - wanted).square()), n),
            "mae": (total((y - wanted).abs()), n),
            "_y": (total(wanted), n),
            "_yy": (total(wanted.square()), n),
            "_p": (total(y), n),
            "_pp": (total(y.square()), n),
            "_py": (total(y * wanted), n),
        }

    def figures(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        found = super().figures(sums)
        y, yy, p, pp, py = (found.pop(f"_{name}", None) for name in ("y", "yy", "p", "pp", "py"))
        if y is None or yy is None or p is None or pp is None or py is None:
            return found
        of_labels, of_output = yy - y * y, pp - p * p
        if of_labels > 0:
            found["r2"] = 1 - found["loss"] / of_labels
            if of_output > 0:
                found["pearson"] = (py - p * y) / math.sqrt(of_labels * of_output)
        return {"mse" if name == "loss" else name: value for name, value in found.items()}


register_task(Regression())
