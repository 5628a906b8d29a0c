"""The hooks of the training loop; most of them do nothing by default."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidArgument
from ..tasks.batch import size_of

Groups = str | tuple[str, ...] | None
"""Names of the optimizer groups that a loss trains; None for all."""


class Hooks:
    """Base class of everything that the training loop trains: fine-tuning and search strategies.

    Attributes:
        passes: Number of `(loss, groups)` pairs that `losses` yields in a step; gradients are synchronized in the last.
        many_processes: False if parameters are trained in turn or rebuilt, which DDP does not support.

    Example:
        >>> import torch
        >>> from hub_mpq.train import Hooks, fit
        >>> class Square(Hooks):
        ...     def parameter_groups(self, model):
        ...         return [{"name": "weights", "params": list(model.parameters()), "lr": 0.1}]
        ...     def losses(self, model, batch, rng):
        ...         yield model(batch).square().mean(), None
        >>> fit(torch.nn.Linear(2, 1), Square(), [torch.ones(4, 2)], steps=3).steps
        3
    """

    passes: int = 1
    many_processes: bool = True

    def check_processes(self, count: int) -> None:
        """Check that this training can run in several processes.

        Args:
            count: Number of processes.

        Raises:
            InvalidArgument: It can run in one process only.
        """
        if count > 1 and not self.many_processes:
            raise InvalidArgument(f"{type(self).__name__} must run in one process, got {count}")

    def pass_names(self) -> list[str]:
        """Name the loss of each pass, for logs.

        Returns:
            One name for each pass.
        """
        return ["loss"] if self.passes == 1 else [f"loss/pass {i}" for i in range(self.passes)]

    def watch(self, model: nn.Module) -> dict[str, float]:
        """Return values to log in addition to the loss.

        Args:
            model: The model in training.

        Returns:
            `{name: value}`.
        """
        return {}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """List the optimizer groups.

        Args:
            model: The model to train.

        Returns:
            Groups with "name", "params", "lr" and, optionally, "weight_decay".
        """
        raise NotImplementedError

    def begin_step(self, model: nn.Module, step: int, total: int) -> None:
        """Called before the passes of a step, for schedules.

        Args:
            model: The model in training.
            step: Number of the step, from 0.
            total: Number of steps of the whole training.
        """

    def losses(self, model: nn.Module, batch: Any, rng: random.Random) -> Iterator[tuple[Tensor, Groups]]:
        """Yield the losses of a step. Each has its own backward pass, and gradients add up.

        Args:
            model: The model in training.
            batch: The batch, on its device.
            rng: Random number generator of the step.

        Yields:
            `(loss, names of the optimizer groups that it trains)`, `passes` times; None for all groups.
        """
        raise NotImplementedError

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called before the optimizer step, when the gradients are complete.

        Args:
            model: The model in training.
            step: Number of the step, from 0.
        """

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after the optimizer step, for projections and averages.

        Args:
            model: The model in training.
            step: Number of the step, from 0.
        """

    def items(self, batch: Any) -> float:
        """Count the items that the loss of a batch is averaged over. They weight the batches of several processes.

        Args:
            batch: The batch.

        Returns:
            Number of items, such as samples or tokens.
        """
        return float(size_of(batch))

    def samples(self, batch: Any) -> int:
        """Count the samples of a batch, for logs.

        Args:
            batch: The batch.

        Returns:
            Number of samples.
        """
        return size_of(batch)

    def stateful(self) -> list[Any]:
        """List the objects that a checkpoint must hold in addition to the model.

        Returns:
            Objects with `state_dict` and `load_state_dict`.
        """
        return []

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """Called after each epoch.

        Args:
            model: The model in training.
            epoch: Number of the epoch, from 0.

        Returns:
            True if parameters were rebuilt, so that the optimizer is re-created.
        """
        return False
