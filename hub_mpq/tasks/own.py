"""The loss that a transformers model computes itself: contrastive models, and all others without a dedicated task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.task import register_task
from ..errors import InvalidArgument
from .batch import arguments_of
from .task import Sums, T, Task


class Own(Task):
    """The loss that a transformers model computes itself, whatever its labels are called.

    The loss is one number per batch and is treated as a mean over samples. All outputs are compared with the float
    model's.

    Args:
        ignore_index: Unused; the model's loss decides.
        label_keys: Keys of labels in a dict; None for the label arguments of the model's forward.
        output: Unused; the loss reads the whole output.

    Example:
        >>> from hub_mpq.tasks import Own
        >>> Own(label_keys="frame_labels").label_keys
        ('frame_labels',)
    """

    name = "own"
    label_keys: tuple[str, ...] = ()

    def bind(self: T, model: nn.Module, example: Any = None) -> T:
        out = super().bind(model, example)
        out.label_keys = self.label_keys or own_labels(model)  # type: ignore[attr-defined]
        return out

    def labels(self, batch: Any) -> Any:
        """Labels as keyword arguments of the forward.

        Args:
            batch: One batch.

        Returns:
            `{key: labels}`; None if the batch has none.
        """
        found = self.parts(batch).labels
        if found is None or (isinstance(found, dict) and set(found) <= set(self.label_keys)):
            return found
        if isinstance(batch, Mapping):
            key = next(key for key in self.label_keys if batch.get(key) is not None)
            return {key: found}
        return {self.label_keys[0]: found} if self.label_keys else found

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self.inputs(batch)
        labels = self.labels(batch)
        return args, {**kwargs, **(labels if isinstance(labels, dict) else {})}

    def item_loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            names = f"its {', '.join(self.label_keys)}" if self.label_keys else "labels, which it does not accept"
            raise InvalidArgument(
                f"{self.signature.model} computes no loss from {names}; choose a task with task=, or use "
                "Task.custom(loss=…)"
            )
        return loss.reshape(-1), torch.ones_like(loss.reshape(-1), dtype=torch.bool)

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        return {"loss": (float(self.loss(output, labels)) * samples, samples)}


class Contrastive(Own):
    """Contrastive models with two towers (CLIP, SigLIP), with the model's own loss over the pairs of a batch.

    There are no labels. The loss depends on the batch size.

    Args:
        ignore_index: Unused; there are no labels.
        label_keys: Unused; the batch is passed with `return_loss=True`.
        output: Unused; the embeddings and similarities of both towers are compared with the float model's.

    Example:
        >>> from hub_mpq.tasks import Contrastive
        >>> Contrastive().label_keys
        ('return_loss',)
    """

    name = "contrastive"
    label_keys = ("return_loss",)

    def labels(self, batch: Any) -> Any:
        return {"return_loss": True}

    def targets(self, output: Any) -> dict[str, Tensor]:
        """The embeddings of both towers and the similarities of the pairs.

        Args:
            output: What the network returned.

        Returns:
            `{name: tensor}`; all tensors of the output if it has neither.
        """
        found = dict(super().targets(output))
        ends = ("_embeds", "_per_image", "_per_audio")
        return {k: v for k, v in found.items() if k.endswith(ends) and "." not in k} or found


def own_labels(model: nn.Module) -> tuple[str, ...]:
    """Arguments of a forward that are labels by the naming of transformers."""
    return tuple(n for n in arguments_of(model) if "label" in n or n in ("start_positions", "end_positions"))


for _task in (Own(), Contrastive()):
    register_task(_task)
