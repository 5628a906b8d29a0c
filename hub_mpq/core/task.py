"""The registry of tasks: what a model's batches, labels, losses, outputs and metrics are."""

from __future__ import annotations

from typing import Any

from .registry import Registry

tasks: Registry[Any] = Registry("task", "hub_mpq.tasks")
"""All tasks, objects of `hub_mpq.Task`: the package's and those registered."""


def register_task(task: Any) -> Any:
    """Make a task known by its name, as `task=` and `--task`, and return it.

    Args:
        task: An object of a subclass of `hub_mpq.Task`.

    Raises:
        InvalidArgument: The name is not a word, or another task has it.
    """
    return tasks.register(getattr(task, "name", ""), task)
