"""Extractive question answering: the start and the end of the answer in the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.task import register_task
from ..errors import InvalidArgument
from .classes import Classes
from .task import Sums, total


class QuestionAnswering(Classes):
    """Extractive question answering: the start and the end of the answer in the text.

    Labels are a dict of `start_positions` and `end_positions`, each `[batch]`; a position beyond the text does not
    count, as in transformers. Items are the two ends of each answer, `[batch, 2]`. Metrics are exact match and accuracy
    in percent, and the loss.

    Args:
        ignore_index: Label that is excluded from losses, metrics and counts; None for none.
        label_keys: Not needed; labels are `start_positions` and `end_positions`.
        output: Unused; the model returns `start_logits` and `end_logits`.

    Example:
        >>> from hub_mpq.tasks import QuestionAnswering
        >>> QuestionAnswering().label_keys
        ('start_positions', 'end_positions')
    """

    name = "question-answering"
    label_keys = ("start_positions", "end_positions")

    def logits(self, output: Any) -> Tensor:
        """Start and end logits.

        Args:
            output: An output with `start_logits` and `end_logits`, each `[batch, tokens]`.

        Returns:
            `[batch, 2, tokens]`.

        Raises:
            InvalidArgument: The output lacks one of them.
        """
        start, end = (getattr(output, f"{side}_logits", None) for side in ("start", "end"))
        if start is None or end is None:
            raise InvalidArgument("task 'question-answering' needs an output with start_logits and end_logits")
        return torch.stack([start, end], 1)

    def beside(self, output: Any) -> dict[str, Tensor]:
        return {}

    def aligned(self, labels: Any, logits: Tensor) -> Tensor:
        if not isinstance(labels, dict) or set(labels) != set(QuestionAnswering.label_keys):
            raise InvalidArgument("task 'question-answering' needs both start_positions and end_positions")
        ends = [labels[key] for key in QuestionAnswering.label_keys]
        ends = [x.squeeze(-1) if x.dim() > 1 else x for x in ends]
        found = torch.stack(ends, 1)
        return super().aligned(torch.where(found >= logits.shape[-1], self.ignore_index, found), logits)

    def places(self, mask: Tensor | None, values: Tensor) -> Tensor:
        return torch.ones_like(values, dtype=torch.bool)

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        drawn = super().sample(output, generator)
        if drawn is None:
            return None
        return dict(zip(QuestionAnswering.label_keys, drawn.unbind(1), strict=True))

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        """Exact match of both ends and accuracy of single ends, in percent, and the loss."""
        logits = self.logits(output)
        wanted = self.aligned(labels, logits)
        counted = (wanted != self.ignore_index).all(1)
        exact = (logits.argmax(-1) == wanted).all(1) & counted
        return {"exact_match": (100 * total(exact), float(counted.sum())), **super().metrics(output, labels, samples)}


register_task(QuestionAnswering())
