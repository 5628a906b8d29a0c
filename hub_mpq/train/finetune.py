"""Fine-tuning at a policy: quantization-aware training with learned scales."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Engine, FinetuneOptions
from ..errors import InvalidArgument
from ..quantizers import LSQ
from ..tasks import Pair, Task, TaskLike, task_of
from .batches import first_batch
from .cpt import CyclicPrecision, check_cycles
from .engine import accelerator_of
from .gradient_quantizers import GradientQuantization, check_kind
from .hooks import Hooks
from .loop import TrainLog, fit
from .norms import reestimate_batch_norm
from .processes import own_share, together
from .random_draws import replayed, rng_state


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
    """The task's loss, distillation from a teacher, or both.

    task: bound to the model. smoothing: of labels; None for the task's own.
    distill: weight of the distillation loss in [0, 1]; 1 needs no labels.
    average: an AveragedModel that follows the weights (EMA), or None. cyclic, gradients: schedules of cyclic precision
    and of quantized gradients, or None.
    """

    def __init__(
        self,
        *,
        task: Task,
        lr: float,
        scale_lr: float,
        weight_decay: float,
        smoothing: float | None,
        teacher: nn.Module | None = None,
        distill: float = 0.0,
        average: Any = None,
        cyclic: CyclicPrecision | None = None,
        gradients: GradientQuantization | None = None,
    ) -> None:
        self.task = task
        self.lr, self.scale_lr, self.weight_decay = lr, scale_lr, weight_decay
        self.smoothing = task.smoothing if smoothing is None else smoothing
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
        if self.teacher is None or self.distill <= 0:
            return self.task.run(model, batch, self.smoothing)[0]
        share = self.distill if self.task.labels(batch) is not None else 1.0
        device = next(self.teacher.parameters()).device
        before = rng_state(device)
        if share < 1:
            loss, output = self.task.run(model, batch, self.smoothing)
        else:
            loss, output = None, self.task.forward(model, batch)
        with torch.no_grad():
            target = replayed(lambda: self.task.forward(self.teacher, batch), device, before)
        distilled = share * self.task.distillation(output, target, batch)
        return distilled if loss is None else (1 - share) * loss + distilled

    def items(self, batch: Any) -> float:
        return self.task.items(batch)

    def samples(self, batch: Any) -> int:
        halves = batch if isinstance(batch, Pair) else (batch,)
        return int(sum(self.task.samples(half) for half in halves))

    def stateful(self) -> list[Any]:
        return [] if self.average is None else [self.average]

    def after_step(self, model: nn.Module, step: int) -> None:
        if self.average is not None:
            self.average.update_parameters(model)


def finetune(
    model: nn.Module,
    train: Iterable[Any],
    options: FinetuneOptions | Mapping[str, Any] | None = None,
    *,
    task: TaskLike = None,
    example: Any = None,
    teacher: nn.Module | None = None,
    engine: Engine | None = None,
    **changes: Any,
) -> TrainLog:
    """Train weights and scales of a quantized model in place: cosine schedule, label smoothing.

    Args:
        model: The quantized model.
        train: Batches as in `HubMPQ.finetune`.
        options: Length, learning rates and so on.
        task: What the model is for; None to find out from it and the first batch.
        example: One input as the network takes it, which says how many inputs a batch has.
        teacher: The float model, for distillation.
        engine: Precision, memory, compiler, trackers.
        changes: Single options by name, in place of those of `options`.

    Raises:
        InvalidArgument: An unknown option or a value out of range, empty data, or distillation without a teacher.
    """
    o = FinetuneOptions.of(options, **changes)
    # wrong values of options that nothing uses yet are mistakes too
    check_cycles(o.cycles)
    check_kind(o.gradient_quantizer)
    first = first_batch(train)
    known = together(lambda: task_of(task, model, first, example))
    distill = o.distill
    if distill is None:
        distill = 1.0 if known.labels(first) is None else 0.0
    if not 0 <= distill <= 1:
        raise InvalidArgument(f"distill is a weight from 0 to 1, not {distill}")
    if distill and teacher is None:
        raise InvalidArgument("distillation needs the float model, which a model loaded from packed weights lacks")
    engine = Engine.of(engine)
    if engine.fsdp:
        raise InvalidArgument("fsdp trains indicators; fine-tuning packs whole weights and runs without it")
    accelerator = accelerator_of(engine, "fine-tune", seed=o.seed)
    if teacher is not None and distill:
        teacher = teacher.to(accelerator.device).eval()
    average = None
    if o.ema is not None:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        model.to(accelerator.device)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(o.ema), use_buffers=True)
    cyclic = None if o.cyclic_bits is None else CyclicPrecision(model, o.cyclic_bits, o.cycles)
    gradients = None
    if o.gradient_bits is not None:
        gradients = GradientQuantization(model, o.gradient_bits, o.gradient_quantizer, o.seed)
    hooks = Finetune(
        task=known,
        lr=o.lr,
        scale_lr=o.scale_lr,
        weight_decay=o.weight_decay,
        smoothing=o.smoothing,
        teacher=teacher if distill else None,
        distill=distill,
        average=average,
        cyclic=cyclic,
        gradients=gradients,
    )
    try:
        log = fit(
            model,
            hooks,
            train,
            epochs=o.epochs,
            steps=o.steps,
            optimizer=o.optimizer,
            seed=o.seed,
            checkpoint_dir=o.checkpoint_dir,
            checkpoint_every=o.checkpoint_every,
            resume=o.resume,
            label="fine-tune",
            accelerator=accelerator,
            engine=engine,
        )
    finally:
        for schedule in (cyclic, gradients):
            if schedule is not None:
                schedule.release()
    if average is not None:
        with torch.no_grad():
            # no integers: an average of a constant zero point can drift by one
            found = average.module.state_dict()
            model.load_state_dict({k: v for k, v in found.items() if v.is_floating_point()}, strict=False)
    if o.reestimate_norms:
        reestimate_batch_norm(model, own_share(train, seed=o.seed), task=known)
    model.eval()
    return log
