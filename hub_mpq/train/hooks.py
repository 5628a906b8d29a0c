"""What a strategy may hook into the loop. Every method has a default that does nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

Groups = str | tuple[str, ...] | None
"""Names of the optimizer groups that a loss trains; None: all of them."""


class Hooks:
    """Base of everything that trains: fine-tuning and each search strategy.

    `passes`: how many (loss, group) pairs `losses` yields a step; the loop syncs gradients on the last one.
    """

    passes: int = 1

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

    def stateful(self) -> list[Any]:
        """Objects beside the model with state_dict and load_state_dict that a checkpoint must hold."""
        return []

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """True when parameters were rebuilt and the optimizer must be made anew."""
        return False
