"""The base class of tasks: how batches are read, and how losses, distances and metrics are computed."""

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
"""{metric: (sum, count)}, which add up over batches of any size and over processes."""


class Task:
    """What a model is used for: how its batches are read, its loss, its metrics, and which outputs are compared.

    To write your own task, subclass it and override `item_loss`, and `metrics` if the loss is not enough.
    `register_task` makes an instance available by name; `Task.custom` builds one from functions.

    Losses and metrics are means over items: samples, tokens, pixels or labels. Methods that return one value per item
    return a tensor `[batch, …]` and a mask of the same shape that marks the items that count.

    Args:
        ignore_index: Label that is excluded from losses, metrics and counts; None for none.
        label_keys: Keys of labels in a dict; None for the task's own.
        output: Which part of the network's output the labels are for, a key or a position; None if there is only
            one, or if a transformers model returns `logits`.

    Attributes:
        name: Name of the task for `task=` and `--task`.
        label_keys: Keys of labels in a dict.
        smoothing: Default label smoothing of training.
        positional: Whether items are positions of a sequence or a map.
        signature: What the forward of the network takes; set by `bind`.

    Example:
        >>> import torch
        >>> from hub_mpq import Task
        >>> class Huber(Task):
        ...     name = "huber"
        ...
        ...     def item_loss(self, output, labels, smoothing=0.0):
        ...         y = self.head(output).squeeze(-1)
        ...         values = torch.nn.functional.huber_loss(y, labels, reduction="none")
        ...         return values, torch.ones_like(values, dtype=torch.bool)
        >>> Huber().loss(torch.zeros(2, 1), torch.ones(2))
        tensor(0.5000)
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
        """Build a task from functions.

        Args:
            loss: `loss(output, labels)` returns a scalar or one value per sample; None for a task that is only
                distilled.
            targets: `targets(output)` returns `{name: tensor}` to compare with the float model; None for all tensors.
            metrics: `metrics(output, labels)` returns `{metric: value}`, each value the mean over the batch or
                `(sum, count)`; None for the loss alone.
            label_keys: Keys of labels in a dict; None for `labels`, `label` (plain networks: also `target`, `y`).
            name: Name of the task in the results of `evaluate`.

        Returns:
            The task.

        Example:
            >>> import torch
            >>> from hub_mpq import Task
            >>> task = Task.custom(lambda output, labels: (output - labels).abs().mean())
            >>> task.loss(torch.zeros(3), torch.ones(3))
            tensor(1.)
        """
        from .custom import Custom

        return Custom(loss, targets=targets, metrics=metrics, label_keys=label_keys, name=name)

    def settings(self) -> dict[str, Any]:
        """Name and options of the task as JSON values, from which it is restored.

        Returns:
            `{"name": …, "ignore_index": …, "output": …, "label_keys": …}`.
        """
        return {"name": self.name, **{key: getattr(self, key) for key in _SETTINGS}}

    def bind(self: T, model: nn.Module, example: Any = None) -> T:
        """Bind a copy of this task to a network, whose forward determines what is an input.

        Args:
            model: The network.
            example: One example input, if available: a tensor, a tuple of arguments or a dict.

        Returns:
            The bound task.
        """
        out = copy.copy(self)
        out.signature = Signature.of(model, example)
        return out

    # the batch

    def parts(self, batch: Any) -> Parts:
        """Split a batch into arguments and labels; the labels go to the device of the first input.

        Args:
            batch: Inputs alone, `(inputs, labels)`, or a dict of keyword arguments with labels.

        Returns:
            Positional arguments, keyword arguments and labels (None if there are none).

        Raises:
            InvalidArgument: A part of the batch is neither an input nor labels.
        """
        found = self.signature.split(batch, self.label_keys)
        first = next(iter(tree_leaves_of((found.args, found.kwargs), Tensor)), None)
        return found if first is None else found._replace(labels=to_device(found.labels, first.device))

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for the forward.

        Args:
            batch: One batch.

        Returns:
            `(args, kwargs)`.
        """
        found = self.parts(batch)
        return found.args, found.kwargs

    def labels(self, batch: Any) -> Any:
        """Labels of a batch.

        Args:
            batch: One batch.

        Returns:
            Tensors, possibly nested; None if the batch has no labels.
        """
        return self.parts(batch).labels

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `inputs`, plus the labels that the forward needs to compute its own loss.

        Args:
            batch: One batch.

        Returns:
            `(args, kwargs)`.
        """
        return self.inputs(batch)

    def forward(self, model: nn.Module, batch: Any, *, labelled: bool = False) -> Any:
        """Run the network on a batch.

        Args:
            model: The network, wrapped or not.
            batch: One batch.
            labelled: Pass the labels too, if the network computes the task's loss itself.

        Returns:
            The network's output, unchanged.

        Raises:
            InvalidArgument: The network cannot be called on this batch.
        """
        args, kwargs = self.arguments(batch) if labelled else self.inputs(batch)
        try:
            return model(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"{self.signature.model} cannot be called on this batch: {error}") from error

    def mask(self, batch: Any) -> Tensor | None:
        """Which tokens of a batch are not padding, from its `attention_mask`.

        Args:
            batch: One batch.

        Returns:
            `[batch, tokens]`, bool; None if the batch has no such mask.
        """
        found = self.inputs(batch)[1].get("attention_mask")
        return found.bool() if isinstance(found, Tensor) and found.dim() == 2 else None

    def samples(self, batch: Any) -> float:
        """Number of samples in a batch: the first axis of its first input.

        Args:
            batch: One batch.

        Returns:
            The number, as a float.
        """
        return float(size_of(self.inputs(batch)))

    def items(self, batch: Any) -> float:
        """Number of items that the loss of a batch is a mean over.

        Args:
            batch: One batch.

        Returns:
            The number, as a float.
        """
        return self.samples(batch)

    # the output

    def head(self, output: Any) -> Tensor:
        """The tensor that the labels are for.

        Args:
            output: What the network returned.

        Returns:
            The part that `output=` of the task names, else `logits`, else the only tensor.

        Raises:
            InvalidArgument: The output contains several tensors, or none, and none is chosen.
        """
        found = tensors_in(output)
        if self.output is not None:
            if str(self.output) not in found:
                raise InvalidArgument(f"unknown output {self.output!r}; choose from {', '.join(found) or 'no tensor'}")
            return found[str(self.output)]
        if "logits" in found:
            return found["logits"]
        if len(found) != 1:
            raise InvalidArgument(
                f"the output contains {', '.join(found) or 'no tensor'}; choose the one that the labels are for with "
                f"{type(self).__name__}(output=…), or use Task.custom(loss=…)"
            )
        return next(iter(found.values()))

    def targets(self, output: Any) -> Mapping[str, Tensor]:
        """The tensors that distillation, scores and fidelity compare, all with the same weight.

        Args:
            output: What the network returned.

        Returns:
            `{name: tensor}`; without hidden states if the output has logits.

        Raises:
            InvalidArgument: The output contains no tensor.
        """
        found = tensors_in(output)
        if not found:
            raise InvalidArgument(f"an output of type {type(output).__name__} contains no tensor to compare")
        if any("logits" in name for name in found):  # the input of a head is not a result
            return {name: x for name, x in found.items() if not name.endswith("hidden_state")}
        return found

    def pairs(self, output: Any, reference: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Targets of two outputs, side by side.

        Args:
            output: What the network returned.
            reference: What the float network returned.

        Returns:
            `{name: (target of the output, target of the reference)}`.

        Raises:
            InvalidArgument: The two outputs have different targets.
        """
        found, wanted = self.targets(output), self.targets(reference)
        if set(found) != set(wanted):
            raise InvalidArgument(
                f"the network returns {', '.join(found)} but the float model returns {', '.join(wanted)}; if the "
                "output differs between training and evaluation, use Task.custom(targets=…)"
            )
        return {name: (found[name], y) for name, y in wanted.items()}

    def beside(self, output: Any) -> dict[str, Tensor]:
        """The targets that the labels are not for.

        Args:
            output: What the network returned.

        Returns:
            `{name: tensor}`.
        """
        head = self.head(output)
        return {name: x for name, x in self.targets(output).items() if x is not head}

    def with_others(self, values: Tensor, output: Any, reference: Any, mask: Tensor | None) -> Tensor:
        """Average the distances of the head's items with those of the other outputs of the same sample.

        Args:
            values: Distances of the head's items, `[batch, …]`.
            output: What the network returned.
            reference: What the float network returned.
            mask: Tokens that are not padding, `[batch, tokens]`; None if all count.

        Returns:
            The averages, in the shape of `values`.
        """
        others = self.beside(reference)
        if not others:
            return values
        both = self.pairs(output, reference)
        rows = torch.stack([squared_error(*both[name], mask) for name in others]).sum(0)
        return (values + rows.view(-1, *[1] * (values.dim() - 1))) / (1 + len(others))

    def item_loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The loss of every item.

        Args:
            output: What the network returned.
            labels: As `labels` returned them.
            smoothing: Label smoothing, for tasks with classes.

        Returns:
            `(losses, mask)`, both `[batch, …]`; the mask marks the items that count.

        Raises:
            InvalidArgument: The labels do not fit the output.
        """
        raise InvalidArgument(f"task {self.name!r} has no loss; remove the labels, or choose another task")

    def divergence(self, output: Any, reference: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The distance of every item from the float model's output.

        By default, the squared error of each target in units of its variance, averaged over all targets, one value per
        sample. For tasks with classes, the KL divergence of each item.

        Args:
            output: What the quantized network returned.
            reference: What the float network returned; it gets no gradient.
            mask: Tokens that are not padding, as `mask` returned it.

        Returns:
            `(distances, mask)`, both `[batch, …]`; the mask marks the items that count.
        """
        rows = [squared_error(x, y, mask) for x, y in self.pairs(output, reference).values()]
        if len({row.shape for row in rows}) > 1:  # outputs that are not rows of samples
            rows = [row.mean()[None] for row in rows]
        values = torch.stack(rows).mean(0)
        return values, torch.ones_like(values, dtype=torch.bool)

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        """Draw labels from the model's own distribution.

        Args:
            output: What the network returned.
            generator: A generator on the CPU.

        Returns:
            Labels as `item_loss` takes them; None for a task whose outputs are not distributions.
        """
        return None

    # what is built from these

    def loss(self, output: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        """The loss of a batch: the mean over the items that count.

        Args:
            output: What the network returned.
            labels: As `labels` returned them.
            smoothing: Label smoothing, for tasks with classes.

        Returns:
            A scalar.
        """
        return mean(*self.item_loss(output, labels, smoothing))

    def run(self, model: nn.Module, batch: Any, smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """Run the network on a batch and compute the loss.

        Args:
            model: The network, wrapped or not.
            batch: One batch with labels.
            smoothing: Label smoothing, for tasks with classes.

        Returns:
            `(loss, output)`.

        Raises:
            InvalidArgument: The batch has no labels, or they do not fit the output.
        """
        labels = self.labels(batch)
        if labels is None:
            raise InvalidArgument("the batch has no labels; pass (inputs, labels), a dict with 'labels', or distill=1")
        output = self.forward(model, batch, labelled=True)
        return self.loss(output, labels, smoothing), output

    def distillation(self, output: Any, reference: Any, batch: Any) -> Tensor:
        """The distillation loss: the mean divergence of the items that count.

        Args:
            output: What the quantized network returned.
            reference: What the float network returned.
            batch: The batch, for its mask.

        Returns:
            A scalar.
        """
        return mean(*self.divergence(output, reference, self.mask(batch)))

    def unit(self, output: Any) -> str:
        """The unit of `divergence`.

        Args:
            output: What the network returned.

        Returns:
            `"kl"`, nats of a distribution that labels can be drawn from, or `"target_error"`, squared error in units of
            the targets' variance.
        """
        return "target_error" if self.sample(output, torch.Generator()) is None else "kl"

    def probe(self, output: Any, generator: torch.Generator, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Random values whose squared derivatives estimate the divergence of every item.

        On average, the square of a value's derivative along a small change of the output is the item's divergence.
        Values of different items are uncorrelated.

        For a distribution, the value is −log p/√2 of labels drawn from it (half the Fisher information is the second
        order of the KL divergence). For all other outputs it is Σ n·y over a target with standard normal n, in units of
        the target's standard deviation. This estimator is our construction.

        Args:
            output: What the network returned, with its gradient.
            generator: A generator on the CPU.
            mask: Tokens that are not padding, as `mask` returned it.

        Returns:
            `(values, mask)`, both `[batch, …]`; the mask marks the items that count.
        """
        free = copy.copy(self)  # a class that is ignored in labels is drawn like any other
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
        """One value per sample whose squared derivative equals the mean of the targets' `squared_error` on average."""
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
        if len({len(row) for row in rows}) > 1:  # outputs that are not rows of samples
            rows = [row.sum()[None] / math.sqrt(len(row)) for row in rows]
        return torch.stack(rows).sum(0) / math.sqrt(len(rows))

    # figures

    def metrics(self, output: Any, labels: Any, samples: float) -> Sums:
        """The metrics of a batch as sums.

        Args:
            output: What the network returned.
            labels: As `labels` returned them.
            samples: Number of samples in the batch, for means over samples.

        Returns:
            `{metric: (sum, count)}`, to be added up over batches and passed to `figures`.
        """
        values, mask = self.item_loss(output, labels)
        return {"loss": (total(torch.where(mask, values, torch.zeros_like(values))), float(mask.sum()))}

    def whole(self) -> Any:
        """Metrics that cannot be computed from sums, such as mean average precision.

        Returns:
            A new object with `update(output, labels)`, called on every batch, and `compute()`, which returns
            `{metric: value}` over the batches of all processes; None if the task has no such metrics.
        """
        return None

    def fidelity(self, output: Any, reference: Any, mask: Tensor | None = None) -> Sums:
        """How close the output of a batch is to the float model's, as sums.

        Args:
            output: What the quantized network returned.
            reference: What the float network returned.
            mask: Tokens that are not padding, as `mask` returned it.

        Returns:
            `{metric: (sum, count)}`, to be added up over batches and passed to `figures`.
        """
        sums: Sums = {}
        for name, (x, y) in self.pairs(output, reference).items():
            x, y = x.float(), y.float()
            if mask is not None and y.dim() > mask.dim() and y.shape[: mask.dim()] == mask.shape:
                x, y = x[mask], y[mask]
            sums[f"noise/{name}"] = (total((x - y).square()), total(y.square()))
        return sums

    def figures(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """The metrics of a data set from the sums over its batches.

        Args:
            sums: `{metric: (sum, count)}`, added up over all batches.

        Returns:
            `{metric: value}`.
        """
        found = {name: value / count for name, (value, count) in sums.items() if count}
        noise = [found.pop(name) for name in list(found) if name.startswith("noise/")]
        if noise:
            found["fidelity_db"] = -10 * math.log10(max(sum(noise) / len(noise), 1e-30))
        return found


def restored(settings: Any) -> Task | None:
    """The task that `Task.settings` describes; None if its name is not registered (as for `Task.custom`) or invalid."""
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
