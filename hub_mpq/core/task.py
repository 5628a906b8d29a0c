"""What a batch, a loss, an output and a metric are: the interface of a task, and the registry of all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from .registry import Registry


class Task(Protocol):
    """What a model is for. Tensors are torch's; this module names none of its types, so that it stays light.

    Attributes:
        name: Name of the task, as `task=` and `--task`.
    """

    name: str

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the model's forward, without labels.

        Args:
            batch: One batch of the user's loader.
        """

    def labels(self, batch: Any) -> Any:
        """Labels of a batch, of any nesting; None when it has none."""

    def loss(self, output: Any, labels: Any) -> Any:
        """The loss of a batch, a scalar tensor: the mean over items that count."""

    def targets(self, output: Any) -> Mapping[str, Any]:
        """{name: tensor}: all tensors of an output that distillation and sensitivity compare."""

    def item_loss(self, output: Any, labels: Any) -> tuple[Any, Any]:
        """(loss of every item, mask of those that count); an item is a sample, a token, a pixel or a label."""

    def divergence(self, output: Any, reference: Any) -> tuple[Any, Any]:
        """(distance of every item from the float model's output, mask of those that count)."""

    def sample(self, output: Any, generator: Any) -> Any:
        """Labels drawn from the model's own distribution; None for a task without one.

        Args:
            output: The model's output.
            generator: A torch.Generator.
        """

    def metrics(self, output: Any, labels: Any) -> Mapping[str, tuple[float, float]]:
        """{metric: (sum, count)} of a batch, so that batches of any size average rightly."""


tasks: Registry[Task] = Registry("task")
"""All tasks."""

T = TypeVar("T", bound=Task)


def register_task(task: T) -> T:
    """Make a task known by its name, and return it.

    Raises:
        InvalidArgument: The name is not a word, or another task has it.
    """
    return tasks.register(getattr(task, "name", ""), task)  # type: ignore[return-value]
