"""What a task is: how batches are read, and what losses, distances and metrics are made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.task import tasks
from ..errors import InvalidArgument
from .batch import Parts, Signature, size_of, to_device, tree_leaves_of
from .outputs import leading, mean, power, squared_error, tensors_in

T = TypeVar("T", bound="Task")
_SETTINGS = ("ignore_index", "output", "label_keys")
Sums = dict[str, tuple[float, float]]
"""{metric: (sum, count)}: they add up over batches of any size and over processes."""


class Task:
    """What a model is for: its batches, its labels, its loss, what is compared of its outputs, and its metrics.

    A task of your own overrides `item_loss`, and `metrics` where the loss alone says too little. `register_task` makes
    an object known by its name; `Task.custom` makes one from functions.

    Items are what losses and metrics are means over: samples, tokens, pixels or labels. Every method that gives one
    value per item gives [batch, …] and a mask of the same shape, of those that count.

    Args:
        ignore_index: Label that is left out of losses, metrics and counts; None for none.
        label_keys: Keys of labels in a dict; None for the task's own.
        output: Which part of the network's output the labels are for, a key or a position; None where there is
            only one, or where the model of transformers says so.

    Attributes:
        name: Name of the task, as `task=` and `--task`.
        label_keys: Keys of labels in a dict.
        smoothing: Label smoothing of a training that names none.
        positional: Whether the items are positions of a sequence or a map.
        signature: What the forward of the network takes; set by `bind`.
    """

    name: str = ""
    smoothing: float = 0.0
    positional: bool = False
    label_keys: tuple[str, ...] = ("labels", "label")

    def __init__(
        self,
        *,
        ignore_index: int | None = -100,
        label_keys: Sequence[str] | None = None,
        output: str | int | None = None,
    ) -> None:
        self.ignore_index: Any = ignore_index
        self.output = output
        if label_keys is not None:
            self.label_keys = (label_keys,) if isinstance(label_keys, str) else tuple(label_keys)
        self.signature: Signature = Signature()

    @staticmethod
    def custom(
        loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        targets: Callable[[Any], Mapping[str, Tensor]] | None = None,
        metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None,
        label_keys: Sequence[str] | None = None,
        name: str = "custom",
    ) -> Task:
        """A task from functions.

        Args:
            loss: loss(output, labels), a scalar or one value per sample; None for a task that is only distilled.
            targets: targets(output), {name: tensor} to compare with the float model; None for all tensors.
            metrics: metrics(output, labels), {metric: mean over the batch, or (sum, count)}; None for the loss alone.
            label_keys: Keys of labels in a dict.
            name: What `evaluate` calls it.

        Example:
            >>> Task.custom(lambda output, labels: (output - labels).abs().mean())
        """
        from .custom import Custom

        return Custom(loss, targets=targets, metrics=metrics, label_keys=label_keys, name=name)

    def settings(self) -> dict[str, Any]:
        """What `restored` makes the task of, as JSON values."""
        return {"name": self.name, **{key: getattr(self, key) for key in _SETTINGS}}

    def bind(self: T, model: nn.Module, example: Any = None) -> T:
        """This task for one network, whose forward says what is an input.

        Args:
            model: The network.
            example: One input as it takes it, where there is one.
        """
        out = copy.copy(self)
        out.signature = Signature.of(model, example)
        return out

    # the batch

    def parts(self, batch: Any) -> Parts:
        """Arguments and labels of a batch, the labels on the device of the first input.

        Raises:
            InvalidArgument: A part of the batch has no place.
        """
        found = self.signature.split(batch, self.label_keys)
        first = next(iter(tree_leaves_of((found.args, found.kwargs), Tensor)), None)
        return found if first is None else found._replace(labels=to_device(found.labels, first.device))

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the forward."""
        found = self.parts(batch)
        return found.args, found.kwargs

    def labels(self, batch: Any) -> Any:
        """Labels of a batch, of any nesting; None when it has none."""
        return self.parts(batch).labels

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `inputs`, with what the forward needs of the labels to compute a loss of its own."""
        return self.inputs(batch)

    def forward(self, model: nn.Module, batch: Any, *, labelled: bool = False) -> Any:
        """The network's own output on a batch.

        Args:
            model: The network, wrapped or not.
            batch: One batch.
            labelled: Pass labels on where the task's loss is the network's own.

        Raises:
            InvalidArgument: The network cannot be called like this.
        """
        args, kwargs = self.arguments(batch) if labelled else self.inputs(batch)
        try:
            return model(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"{self.signature.model} can't be called on this batch: {error}") from error

    def mask(self, batch: Any) -> Tensor | None:
        """Which tokens of a batch are no padding, [batch, tokens]; None when it does not say."""
        found = self.inputs(batch)[1].get("attention_mask")
        return found.bool() if isinstance(found, Tensor) and found.dim() == 2 else None

    def samples(self, batch: Any) -> float:
        """Samples of a batch: the first axis of its first input."""
        return float(size_of(self.inputs(batch)))

    def items(self, batch: Any) -> float:
        """Items that the loss of a batch is a mean over."""
        return self.samples(batch)

    # the output

    def head(self, output: Any) -> Tensor:
        """The tensor that labels are for.

        Raises:
            InvalidArgument: The output holds several, or none.
        """
        found = tensors_in(output)
        if self.output is not None:
            if str(self.output) not in found:
                raise InvalidArgument(f"the output has no {self.output!r}; it has {', '.join(found) or 'no tensor'}")
            return found[str(self.output)]
        if "logits" in found:
            return found["logits"]
        if len(found) != 1:
            raise InvalidArgument(
                f"the output holds {', '.join(found) or 'no tensor'}: say which the labels are for, as in "
                f"{type(self).__name__}(output=…), or give Task.custom(loss=…)"
            )
        return next(iter(found.values()))

    def targets(self, output: Any) -> Mapping[str, Tensor]:
        """{name: tensor} of everything that distillation, sensitivity and fidelity compare; all count alike.

        Raises:
            InvalidArgument: The output holds no tensor.
        """
        found = tensors_in(output)
        if not found:
            raise InvalidArgument(f"an output of type {type(output).__name__} holds no tensor to compare")
        if any("logits" in name for name in found):  # what a head has read is no result
            return {name: x for name, x in found.items() if not name.endswith("hidden_state")}
        return found

    def pairs(self, output: Any, reference: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (target, the reference's)}. Raises InvalidArgument for outputs of different forms."""
        found, wanted = self.targets(output), self.targets(reference)
        if set(found) != set(wanted):
            raise InvalidArgument(
                f"the network returns {', '.join(found)} where the float model returns {', '.join(wanted)}: an output "
                "that differs in training and evaluation can't be compared; give Task.custom(targets=…)"
            )
        return {name: (found[name], y) for name, y in wanted.items()}

    def beside(self, output: Any) -> dict[str, Tensor]:
        """Targets that the labels are not for."""
        head = self.head(output)
        return {name: x for name, x in self.targets(output).items() if x is not head}

    def with_others(self, values: Tensor, output: Any, reference: Any, mask: Tensor | None) -> Tensor:
        """Distances of the head's items, averaged with those of their sample's other outputs."""
        others = self.beside(reference)
        if not others:
            return values
        both = self.pairs(output, reference)
        rows = torch.stack([squared_error(*both[name], mask) for name in others]).sum(0)
        return (values + rows.view(-1, *[1] * (values.dim() - 1))) / (1 + len(others))

    def item_loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(loss of every item, mask of those that count).

        Args:
            output: What the network returned.
            labels: As `labels` gave them.
            smoothing: Label smoothing, for classes.

        Raises:
            InvalidArgument: Labels that do not fit the output.
        """
        raise InvalidArgument(f"task {self.name!r} has no loss; leave the labels out, or give another task")

    def divergence(self, output: Any, reference: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(distance of every item from the float model's output, mask of those that count).

        Here: the squared error of each target in units of its variance, the mean over all targets, one value per
        sample. Tasks with classes: the KL divergence of each item.

        Args:
            output, reference: What the quantized and the float network returned; the reference gets no gradient.
            mask: Tokens that are no padding, as `mask` gave it.
        """
        rows = [squared_error(x, y, mask) for x, y in self.pairs(output, reference).values()]
        if len({row.shape for row in rows}) > 1:  # outputs that are no rows of samples
            rows = [row.mean()[None] for row in rows]
        values = torch.stack(rows).mean(0)
        return values, torch.ones_like(values, dtype=torch.bool)

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        """Labels drawn from the model's own distribution; None for a task without one.

        Args:
            output: What the network returned.
            generator: A generator on the CPU.
        """
        return None

    # what is built from these

    def loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        """The loss of a batch: the mean over the items that count."""
        return mean(*self.item_loss(output, labels, smoothing))

    def run(self, model: nn.Module, batch: Any, smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """(loss, output) on a batch. Raises InvalidArgument when it has no labels, or ones that do not fit."""
        labels = self.labels(batch)
        if labels is None:
            raise InvalidArgument("the batches have no labels; give (inputs, labels), a dict with 'labels', or distill")
        output = self.forward(model, batch, labelled=True)
        return self.loss(output, labels, smoothing), output

    def distillation(self, output: Any, reference: Any, batch: Any) -> Tensor:
        """How far an output is from the float model's: the mean divergence of the items that count."""
        return mean(*self.divergence(output, reference, self.mask(batch)))

    def unit(self, output: Any) -> str:
        """What `divergence` is counted in: "kl", nats of a distribution that labels can be drawn from, or
        "target_error", squared error in units of the targets' variance."""
        return "target_error" if self.sample(output, torch.Generator()) is None else "kl"

    def probe(self, output: Any, generator: torch.Generator, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(a random value of every item, mask of those that count): the square of its derivative along a small change
        of the output is on average the item's divergence, and values of two items are uncorrelated.

        With a distribution it is −log p/√2 of labels drawn from it (the Fisher information, whose half is the second
        order of the KL divergence); without, and for other outputs, Σ n·y over a target with standard normal n, in
        units of its deviation [our construction].

        Args:
            output: What the network returned, with its gradient.
            generator: A generator on the CPU.
            mask: Tokens that are no padding, as `mask` gave it.
        """
        free = copy.copy(self)  # a class that labels leave out is drawn as any other
        free.ignore_index = -100
        drawn = free.sample(output, generator)
        if drawn is None:
            values = self._projected(self.targets(output), generator, mask)
            return values, torch.ones_like(values, dtype=torch.bool)
        if isinstance(drawn, Tensor) and mask is not None and mask.shape == drawn.shape:
            drawn = drawn.masked_fill(~mask, free.ignore_index)
        values, kept = free.item_loss(output, drawn)
        values = values / math.sqrt(2)
        if others := self.beside(output):
            rows = self._projected(others, generator, mask) * math.sqrt(len(others))  # a sum, as in `with_others`
            per_item = rows / kept.flatten(1).sum(1).clamp_min(1).sqrt() if kept.dim() > 1 else rows
            values = (values + per_item.view(-1, *[1] * (values.dim() - 1))) / math.sqrt(1 + len(others))
        return values, kept

    @staticmethod
    def _projected(targets: Mapping[str, Tensor], generator: torch.Generator, mask: Tensor | None) -> Tensor:
        """One value per sample whose squared derivative is on average the mean of the targets' `squared_error`."""
        rows = []
        for y in targets.values():
            counted = leading(mask, y)
            n = torch.randn(y.shape, generator=generator).to(y.device)
            scaled = y.float() * n / power(y.detach(), counted).sqrt()
            if y.dim() < 2:
                rows.append(scaled.reshape(-1))
                continue
            if counted is None:
                rows.append(scaled.flatten(1).sum(1) / math.sqrt(scaled[0].numel()))
                continue
            inner = scaled.flatten(counted.dim()).sum(-1) / math.sqrt(math.prod(y.shape[counted.dim() :]))
            kept = counted.flatten(1).sum(1).clamp_min(1)
            rows.append((inner * counted).flatten(1).sum(1) / kept.sqrt())
        if len({len(row) for row in rows}) > 1:  # outputs that are no rows of samples
            rows = [row.sum()[None] / math.sqrt(len(row)) for row in rows]
        return torch.stack(rows).sum(0) / math.sqrt(len(rows))

    # figures

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        """{metric: (sum, count)} of a batch.

        Args:
            output: What the network returned.
            labels: As `labels` gave them.
            samples: How many samples the batch has, for means that are over samples.
        """
        values, mask = self.item_loss(output, labels)
        return {"loss": (total(torch.where(mask, values, torch.zeros_like(values))), float(mask.sum()))}

    def whole(self) -> Any:
        """A new object for metrics that no sums make: `update(output, labels)` for every batch, then `compute()` gives
        {metric: value} of all processes' batches. None where there are none."""
        return None

    def fidelity(self, output: Any, reference: Any, mask: Tensor | None = None) -> Sums:
        """{metric: (sum, count)} of how close a batch's output is to the float model's."""
        sums: Sums = {}
        for name, (x, y) in self.pairs(output, reference).items():
            x, y = x.float(), y.float()
            if mask is not None and y.dim() > mask.dim() and y.shape[: mask.dim()] == mask.shape:
                x, y = x[mask], y[mask]
            sums[f"noise/{name}"] = (total((x - y).square()), total(y.square()))
        return sums

    def figures(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Metrics of a whole data set from what all its batches added up to."""
        found = {name: value / count for name, (value, count) in sums.items() if count}
        noise = [found.pop(name) for name in list(found) if name.startswith("noise/")]
        if noise:
            found["fidelity_db"] = -10 * math.log10(max(sum(noise) / len(noise), 1e-30))
        return found


def restored(settings: Any) -> Task | None:
    """The task of `Task.settings`; None where its name is not registered, as that of `Task.custom`, or it is none."""
    name = settings.get("name") if isinstance(settings, Mapping) else None
    if not isinstance(name, str) or name not in tasks:
        return None
    out: Task = copy.copy(tasks.get(name))
    for key in _SETTINGS:
        if key in settings:
            setattr(out, key, tuple(settings[key]) if key == "label_keys" else settings[key])
    return out


def total(x: Tensor) -> float:
    """Sum of a tensor in double precision."""
    return float(x.sum(dtype=torch.float64))
