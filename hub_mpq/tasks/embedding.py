"""Features, and any other output whose meaning is unknown."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.task import register_task
from .task import Sums, Task, total


class Embedding(Task):
    """Features without labels and loss: outputs are only compared with the float model's.

    Args:
        ignore_index: Unused; there are no labels.
        label_keys: Keys in a dict that are labels, which are ignored.
        output: The part of the output to compare, a key or a position; None for all tensors.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import Embedding
        >>> task = Embedding()
        >>> x = torch.arange(8.0).view(2, 4)
        >>> task.figures(task.fidelity(x + 0.1, x))["agreement"]
        100.0
    """

    name = "embedding"

    def labels(self, batch: Any) -> None:
        """None: labels in a batch are ignored.

        Args:
            batch: One batch.
        """
        self.parts(batch)

    def targets(self, output: Any) -> Any:
        return {str(self.output): self.head(output)} if self.output is not None else super().targets(output)

    def fidelity(self, output: Any, reference: Any, mask: Tensor | None = None) -> Sums:
        """As `Task.fidelity`, plus the agreement of the arg max if the only output is [batch, values]."""
        sums = super().fidelity(output, reference, mask)
        found, wanted = list(self.targets(output).values()), list(self.targets(reference).values())
        if len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1:
            same = found[0].argmax(-1) == wanted[0].argmax(-1)
            sums["agreement"] = (100 * total(same), float(same.numel()))
        return sums


register_task(Embedding())
