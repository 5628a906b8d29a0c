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
    """Split the parameters that require a gradient into weights with decay, biases and norms, and quantizer scales."""
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
    """Train on the loss of a task, distillation from a teacher, or both.

    Args:
        task: Task, bound to the model.
        lr: Learning rate of the weights.
        scale_lr: Learning rate of the logarithms of the scales.
        weight_decay: Weight decay of the weights.
        smoothing: Label smoothing; None for the task's default.
        teacher: The float model, for distillation.
        distill: Weight in [0, 1] of the distillation loss; 1 needs no labels.
        average: An `AveragedModel` that follows the weights (EMA), or None.
        cyclic: Schedule of cyclic precision, or None.
        gradients: Schedule of quantized gradients, or None.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import Classification
        >>> from hub_mpq.train import Finetune
        >>> hooks = Finetune(task=Classification(), lr=1e-4, scale_lr=1e-3, weight_decay=0.0, smoothing=0.0)
        >>> batch = (torch.zeros(2, 4), torch.tensor([0, 1]))
        >>> hooks.loss(torch.nn.Identity(), batch)
        tensor(1.3863)
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
        """Compute the loss of one forward pass.

        Args:
            model: The model in training.
            batch: The batch, on its device.

        Returns:
            The loss, a scalar.
        """
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
    """Train the weights and scales of a quantized model in place, with a cosine schedule.

    Args:
        model: The quantized model.
        train: Batches: `(inputs, labels)`, dicts with labels, or inputs alone, for distillation.
        options: Length, learning rates and other options.
        task: Task of the model; None to infer it from the model and the first batch.
        example: One input as the network takes it, which tells how many inputs a batch has.
        teacher: The float model, for distillation.
        engine: Precision, memory, compiler, trackers.
        **changes: Single options by name, which override those of `options`.

    Returns:
        Steps, samples, seconds and losses of the training.

    Raises:
        InvalidArgument: An option is unknown or out of range, there are no data, or distillation has no teacher.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.train import finetune
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> batch = (torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
        >>> model = mpq.apply_policy("W4A4", [batch]).model
        >>> finetune(model, [batch], steps=1).steps
        1
    """
    o = FinetuneOptions.of(options, **changes)
    # options are checked even if nothing uses them
    check_cycles(o.cycles)
    check_kind(o.gradient_quantizer)
    first = first_batch(train)
    known = together(lambda: task_of(task, model, first, example))
    distill = o.distill
    if distill is None:
        distill = 1.0 if known.labels(first) is None else 0.0
    if not 0 <= distill <= 1:
        raise InvalidArgument(f"distill must be between 0 and 1, got {distill}")
    if distill and teacher is None:
        raise InvalidArgument(
            "distillation needs the float model, which a model loaded from packed weights does not have"
        )
    engine = Engine.of(engine)
    if engine.fsdp:
        raise InvalidArgument(
            "fsdp is supported for training indicators only; fine-tune without it, because packing needs whole weights"
        )
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
            # without integers: the average of a constant zero point can drift by one
            found = average.module.state_dict()
            model.load_state_dict({k: v for k, v in found.items() if v.is_floating_point()}, strict=False)
    if o.reestimate_norms:
        reestimate_batch_norm(model, own_share(train, seed=o.seed), task=known)
    model.eval()
    return log
