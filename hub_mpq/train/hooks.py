"""What a strategy may hook into the loop. Every method has a default that does nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidArgument
from ..tasks.batch import size_of

Groups = str | tuple[str, ...] | None
"""Names of the optimizer groups that a loss trains; None: all of them."""


class Hooks:
    """Base of everything that trains: fine-tuning and each search strategy.

    `passes`: how many (loss, group) pairs `losses` yields a step; the loop syncs gradients on the last one.
    `many_processes`: False where parameters are trained in turn or rebuilt, which DDP does not follow.
    """

    passes: int = 1
    many_processes: bool = True

    def check_processes(self, count: int) -> None:
        """Raise InvalidArgument when this training cannot be spread over `count` processes."""
        if count > 1 and not self.many_processes:
            raise InvalidArgument(f"{type(self).__name__} trains in one process only, not in {count}")

    def pass_names(self) -> list[str]:
        """A name for the loss of each pass, for reports."""
        return ["loss"] if self.passes == 1 else [f"loss/pass {i}" for i in range(self.passes)]

    def watch(self, model: nn.Module) -> dict[str, float]:
        """What a tracker should follow beside the loss."""
        return {}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups: {"name", "params", "lr", "weight_decay"?}."""
        raise NotImplementedError

    def begin_step(self, model: nn.Module, step: int, total: int) -> None:
        """Before the passes of step `step` of `total`: schedules."""

    def losses(self, model: nn.Module, batch: Any, rng: random.Random) -> Iterator[tuple[Tensor, Groups]]:
        """Yield (loss, group names): each gets its own backward, gradients add up. A group of None: all parameters."""
        raise NotImplementedError

    def before_step(self, model: nn.Module, step: int) -> None:
        """Gradients are complete, the optimizer has not stepped."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """The optimizer has stepped: projections, averages."""

    def items(self, batch: Any) -> float:
        """Items that the loss of a batch is a mean over; they weigh the batches of several processes."""
        return float(size_of(batch))

    def samples(self, batch: Any) -> int:
        """Samples of a batch, for logs."""
        return size_of(batch)

    def stateful(self) -> list[Any]:
        """Objects beside the model with state_dict and load_state_dict that a checkpoint must hold."""
        return []

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """True when parameters were rebuilt and the optimizer must be made anew."""
        return False
