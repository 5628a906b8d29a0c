"""Fine-tuning at a policy: quantization-aware training with learned scales."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import LSQ
from .batch import distillation_loss, forward, holds_classes, labels_of, task_loss
from .cpt import CyclicPrecision
from .gradient_quantizers import GradientQuantization
from .hooks import Hooks


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(weights that decay, biases and norms, scales of quantizers) that require a gradient."""
    scale_ids = {id(m.shift) for m in model.modules() if isinstance(m, LSQ)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            home = scales if id(parameter) in scale_ids else decayed if parameter.dim() > 1 else plain
            home.append(parameter)
    return decayed, plain, scales


class Finetune(Hooks):
    """Cross-entropy (or the model's own loss), distillation from a teacher, or both.

    distill: weight of the distillation loss in [0, 1]; 1 needs no labels.
    average: an AveragedModel that follows the weights (EMA), or None. cyclic, gradients: schedules of cyclic precision
    and of quantized gradients, or None.
    """

    def __init__(
        self,
        *,
        lr: float,
        scale_lr: float,
        weight_decay: float,
        smoothing: float,
        teacher: nn.Module | None = None,
        distill: float = 0.0,
        average: Any = None,
        cyclic: CyclicPrecision | None = None,
        gradients: GradientQuantization | None = None,
    ) -> None:
        self.lr, self.scale_lr, self.weight_decay, self.smoothing = lr, scale_lr, weight_decay, smoothing
        self.teacher, self.distill, self.average = teacher, distill, average
        self.cyclic, self.gradients = cyclic, gradients

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed, plain, scales = split_parameters(model)
        return [
            {"name": "weights", "params": decayed, "lr": self.lr, "weight_decay": self.weight_decay},
            {"name": "biases", "params": plain, "lr": self.lr, "weight_decay": 0.0},
            {"name": "scales", "params": scales, "lr": self.scale_lr, "weight_decay": 0.0},
        ]

    def begin_step(self, model: nn.Module, step: int, total: int) -> None:
        if self.cyclic is not None:
            self.cyclic.set(step, total)
        if self.gradients is not None:
            self.gradients.set(step)

    def losses(self, model: nn.Module, batch: Any, rng: random.Random) -> Iterator[tuple[Tensor, str | None]]:
        yield self.loss(model, batch), None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one forward pass."""
        if self.teacher is None or (self.distill < 1 and labels_of(batch) is not None):
            loss, output = task_loss(model, batch, self.smoothing)
        else:
            loss, output = torch.zeros(()), forward(model, batch)
        if self.teacher is None or self.distill <= 0:
            return loss
        with torch.no_grad():
            target = forward(self.teacher, batch)
        labels = labels_of(batch)
        share = self.distill if labels is not None else 1.0
        return (1 - share) * loss.to(next(iter(model.parameters())).device) + share * distillation_loss(
            output, target, classes=holds_classes(output, labels)
        )

    def stateful(self) -> list[Any]:
        return [] if self.average is None else [self.average]

    def after_step(self, model: nn.Module, step: int) -> None:
        if self.average is not None:
            self.average.update_parameters(model)
