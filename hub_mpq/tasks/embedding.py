"""Features, and any output of which nothing more is known."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.task import register_task
from .task import Sums, Task, total


class Embedding(Task):
    """No labels and no loss: all tensors of the output are compared with the float model's.

    With `output=`, that one alone.
    """

    name = "embedding"

    def labels(self, batch: Any) -> None:
        """None: labels that a batch has are not looked at."""
        self.parts(batch)

    def targets(self, output: Any) -> Any:
        return {str(self.output): self.head(output)} if self.output is not None else super().targets(output)

    def fidelity(self, output: Any, reference: Any, mask: Tensor | None = None) -> Sums:
        """With the agreement of the arg max where the one output may hold classes, [batch, values]."""
        sums = super().fidelity(output, reference, mask)
        found, wanted = list(self.targets(output).values()), list(self.targets(reference).values())
        if len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1:
            same = found[0].argmax(-1) == wanted[0].argmax(-1)
            sums["agreement"] = (100 * total(same), float(same.numel()))
        return sums


register_task(Embedding())
