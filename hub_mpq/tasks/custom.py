"""A task built from user-supplied functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .task import Sums, Task


class Custom(Task):
    """The task that `Task.custom` returns."""

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor] | None,
        *,
        targets: Callable[[Any], Mapping[str, Tensor]] | None,
        metrics: Callable[[Any, Any], Mapping[str, Any]] | None,
        label_keys: Sequence[str] | None,
        name: str,
    ) -> None:
        super().__init__(label_keys=label_keys)
        self.name = name
        self._loss, self._targets, self._metrics = loss, targets, metrics

    def labels(self, batch: Any) -> Any:
        """None for a task without a loss and metrics, which can only be distilled."""
        found = super().labels(batch)
        return None if self._loss is None and self._metrics is None else found

    def targets(self, output: Any) -> Mapping[str, Tensor]:
        return super().targets(output) if self._targets is None else self._targets(output)

    def item_loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        if self._loss is None:
            return super().item_loss(output, labels, smoothing)
        values = self._loss(output, labels)
        if not isinstance(values, Tensor) or values.dim() > 1:
            raise InvalidArgument("the loss of a custom task must return a scalar tensor or one value per sample")
        values = values.reshape(-1)
        return values, torch.ones_like(values, dtype=torch.bool)

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        sums: Sums = {}
        if self._loss is not None:
            sums["loss"] = (float(self.loss(output, labels)) * samples, samples)
        for name, value in (self._metrics(output, labels) if self._metrics is not None else {}).items():
            pair = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, None)
            try:
                amount, count = float(pair[0]), samples if pair[1] is None else float(pair[1])
            except (TypeError, ValueError, RuntimeError) as error:
                raise InvalidArgument(f"metric {name!r} must be a number or (sum, count), got {value!r:.60}") from error
            sums[name] = (amount * (samples if pair[1] is None else 1), count)
        return sums
