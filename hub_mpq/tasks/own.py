"""The loss that a model of transformers computes itself: contrastive models, and whatever has no task of its own."""

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
    """The model's own loss, whatever its labels are called; all outputs are targets.

    One number a batch: a mean over samples, as far as anybody knows.
    """

    name = "own"
    label_keys: tuple[str, ...] = ()

    def bind(self: T, model: nn.Module, example: Any = None) -> T:
        out = super().bind(model, example)
        out.label_keys = self.label_keys or own_labels(model)  # type: ignore[attr-defined]
        return out

    def labels(self, batch: Any) -> Any:
        """{key: labels} as the forward takes them."""
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
            names = f"its {', '.join(self.label_keys)}" if self.label_keys else "labels, which it does not take"
            raise InvalidArgument(
                f"{self.signature.model} computes no loss from {names}; name the task by task=, or give "
                "Task.custom(loss=…)"
            )
        return loss.reshape(-1), torch.ones_like(loss.reshape(-1), dtype=torch.bool)

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        return {"loss": (float(self.loss(output, labels)) * samples, samples)}


class Contrastive(Own):
    """Two towers whose pairs belong together (CLIP, SigLIP): the loss is over the pairs of one batch, without labels.

    Its value depends on the batch size.
    """

    name = "contrastive"
    label_keys = ("return_loss",)

    def labels(self, batch: Any) -> Any:
        return {"return_loss": True}

    def targets(self, output: Any) -> dict[str, Tensor]:
        """Both towers' embeddings, and how alike the pairs are."""
        found = dict(super().targets(output))
        ends = ("_embeds", "_per_image", "_per_audio")
        return {k: v for k, v in found.items() if k.endswith(ends) and "." not in k} or found


def own_labels(model: nn.Module) -> tuple[str, ...]:
    """Arguments of a forward that are labels by the customs of transformers."""
    return tuple(n for n in arguments_of(model) if "label" in n or n in ("start_positions", "end_positions"))


for _task in (Own(), Contrastive()):
    register_task(_task)
