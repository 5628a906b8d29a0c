"""Several outputs with their own labels, each with its own task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .outputs import tensors_in
from .task import Sums, Task


class Heads(Task):
    """Several outputs, each with its own task; the loss is the sum of theirs.

    Labels are nested like the outputs, in tuples or dicts. Metrics are reported as `<output>/<metric>`.

    Args:
        heads: `{output: task}`, where nested outputs are named by keys and positions joined with dots: `"0"`,
            `"boxes.logits"`.
        **options: Options of `Task`.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import Classification, Heads, Regression
        >>> task = Heads({"0": Classification(), "1": Regression()})
        >>> output = torch.zeros(2, 4), torch.zeros(2, 1)
        >>> labels = torch.tensor([0, 3]), torch.ones(2)
        >>> task.loss(output, labels)
        tensor(2.3863)
    """

    name = "heads"

    def __init__(self, heads: Mapping[str, Task], **options: Any) -> None:
        super().__init__(**options)
        self.heads = dict(heads)

    def _each(self, output: Any, labels: Any = None) -> list[tuple[str, Task, Tensor, Any]]:
        found, wanted = tensors_in(output), leaves(labels)
        for key in self.heads:
            if key not in found or (labels is not None and key not in wanted):
                raise InvalidArgument(
                    f"unknown {'output' if key not in found else 'label'} {key!r}; choose from "
                    f"{', '.join(found if key not in found else wanted)}"
                )
        return [(key, task, found[key], wanted.get(key)) for key, task in self.heads.items()]

    def item_loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """One value per sample: the sum of its losses over all outputs."""
        rows, masks = [], []
        for _, task, head, wanted in self._each(output, labels):
            values, mask = task.item_loss(head, wanted, smoothing)
            rows.append(per_sample(values, mask))
            masks.append(mask.flatten(1).any(1) if mask.dim() > 1 else mask)
        return torch.stack(rows).sum(0), torch.stack(masks).any(0)

    def loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        """The sum of the mean losses of all outputs."""
        each = [task.loss(head, wanted, smoothing) for _, task, head, wanted in self._each(output, labels)]
        return torch.stack(each).sum()

    def divergence(self, output: Any, reference: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One value per sample: the mean over its outputs."""
        rows = []
        for (_, task, head, _), (_, _, wanted, _) in zip(self._each(output), self._each(reference), strict=True):
            values, kept = task.divergence(head, wanted, mask)
            rows.append(per_sample(values, kept))
        values = torch.stack(rows).mean(0)
        return values, torch.ones_like(values, dtype=torch.bool)

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        drawn = {key: task.sample(head, generator) for key, task, head, _ in self._each(output)}
        return None if any(labels is None for labels in drawn.values()) else drawn

    def probe(self, output: Any, generator: torch.Generator, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One value per sample, from the items of all its outputs."""
        rows = []
        for _, task, head, _ in self._each(output):
            values, kept = task.probe(head, generator, mask)
            values = torch.where(kept, values, torch.zeros_like(values)).reshape(len(values), -1).sum(1)
            rows.append(values / kept.reshape(len(kept), -1).sum(1).clamp_min(1).sqrt())
        values = torch.stack(rows).sum(0) / math.sqrt(len(rows))
        return values, torch.ones_like(values, dtype=torch.bool)

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        """The metrics of each output as `<output>/<metric>`."""
        sums: Sums = {}
        for key, task, head, wanted in self._each(output, labels):
            sums |= {f"{key}/{name}": pair for name, pair in task.metrics(head, wanted, samples).items()}
        return sums

    def figures(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        found = super().figures({k: v for k, v in sums.items() if k.partition("/")[0] not in self.heads})
        for key, task in self.heads.items():
            mine = {k.removeprefix(f"{key}/"): v for k, v in sums.items() if k.startswith(f"{key}/")}
            found |= {f"{key}/{name}": value for name, value in task.figures(mine).items()}
        return found


def per_sample(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over each sample's items that count, [batch]; 0 if none does."""
    kept = torch.where(mask, values, torch.zeros_like(values)).reshape(len(values), -1).sum(1)
    return kept / mask.reshape(len(mask), -1).sum(1).clamp_min(1)


def leaves(labels: Any, prefix: str = "") -> dict[str, Any]:
    """{path: labels} of nested labels, with the paths of `tensors_in`."""
    if isinstance(labels, Mapping):
        parts: Any = labels.items()
    elif isinstance(labels, (tuple, list)):
        parts = ((str(i), part) for i, part in enumerate(labels))
    else:
        return {prefix or "output": labels}
    found: dict[str, Any] = {}
    for key, part in parts:
        found |= leaves(part, f"{prefix}.{key}" if prefix else str(key))
    return found
