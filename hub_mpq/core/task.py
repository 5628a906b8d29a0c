"""The registry of tasks, which define a model's batches, labels, losses, outputs and metrics."""

from __future__ import annotations

from typing import Any

from .registry import Registry

tasks: Registry[Any] = Registry("task", "hub_mpq.tasks")
"""All tasks (objects of `hub_mpq.Task`), built-in and registered."""


def register_task(task: Any) -> Any:
    """Register a task under its name, for `task=` and `--task`.

    Args:
        task: An object of a subclass of `hub_mpq.Task`; its name must be new.

    Returns:
        The same task.

    Raises:
        InvalidArgument: The name is not valid, or another task has it.

    Example:
        >>> from hub_mpq import register_task
        >>> from hub_mpq.core import tasks
        >>> class Ratings(type(tasks.get("regression"))):
        ...     name = "ratings"
        >>> task = register_task(Ratings())
    """
    return tasks.register(getattr(task, "name", ""), task)
