"""Which task a model has: by its class, else by what its labels and its output look like, where that is certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.task import tasks
from ..errors import InvalidArgument
from ..nn.types import device_of
from .batch import arguments_of, evaluating, inner, to_device, tree_leaves_of
from .heads import Heads, leaves
from .outputs import squeezed, tensors_in
from .own import own_labels
from .task import Task

TaskLike = Task | str | None
"""A task, its name, or None: found out."""

_BY_CLASS = (
    (("XLNetForQuestionAnswering", "XLMForQuestionAnswering", "FlaubertForQuestionAnswering"), "own"),
    (("XLNetLMHeadModel", "WithLMHeadModel", "DoubleHeadsModel", "ForMultipleChoice", "GitForCausalLM"), "own"),
    (("ForSequenceClassification", "ForImageClassification", "ForImageClassificationWithTeacher"), "classes"),
    (("ForAudioClassification", "ForVideoClassification"), "classes"),
    (("ForTokenClassification",), "token-classification"),
    (("ForMaskedLM",), "masked-lm"),
    (("ForCausalLM", "LMHeadModel"), "causal-lm"),
    (("ForConditionalGeneration", "EncoderDecoderModel"), "generation"),
    (("ForQuestionAnswering",), "span"),
    (("ForSemanticSegmentation",), "segmentation"),
    (("ForObjectDetection",), "detection"),
    (("ForDepthEstimation",), "regression"),
)
"""(ends of a class's name in transformers, task)."""


def task_of(task: TaskLike, model: nn.Module, batch: Any = None, example: Any = None) -> Task:
    """The task to use, bound to a model.

    Args:
        task: What the user said: a task or its name; None to find out.
        model: The network, not wrapped.
        batch: A batch that will be used, with its labels if it has any; None for what the model alone tells.
        example: One input as the network takes it, where there is one.

    Raises:
        InvalidArgument: An unknown name, or labels that fit several tasks or none; the error names the choices.
    """
    if isinstance(task, str):
        task = tasks.get(task)
    if task is not None:
        if not isinstance(task, Task):
            raise InvalidArgument(f"task is a name or an object of hub_mpq.Task, not {type(task).__name__}")
        return task.bind(model, example)
    name = _by_class(inner(model))
    plain = tasks.get(name or "embedding").bind(model, example)
    if batch is None:
        return plain  # type: ignore[no-any-return]
    if name == "contrastive" and not (isinstance(batch, Mapping) and batch.get("return_loss")):
        return tasks.get("embedding").bind(model, example)  # type: ignore[no-any-return]
    if name not in (None, "classification"):
        _check_mask(plain, batch)
        return plain  # type: ignore[no-any-return]
    if name is None and own_labels(model):
        own = tasks.get("own").bind(model, example)
        if own.labels(batch) is not None:
            return own  # type: ignore[no-any-return]
    any_labels = tasks.get("classification").bind(model, example)
    labels = any_labels.labels(batch)
    if labels is not None and _headless(inner(model)):
        raise InvalidArgument(
            f"{type(inner(model)).__name__} has no head, so its output is features and not what labels are for; load "
            "it with a head, leave the labels out, or name a task by task="
        )
    numbers = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    if labels is None or (name and numbers):
        return plain  # type: ignore[no-any-return]
    batch = to_device(batch, device_of(model))
    with evaluating(model):
        output = any_labels.forward(model, batch)
    first = next(iter(tree_leaves_of(any_labels.inputs(batch), Tensor)), None)
    found = by_labels(output, any_labels.labels(batch), first)
    return found.bind(model, example)


def _by_class(model: nn.Module) -> str | None:
    """Name of the task of a model of transformers; None for other networks and for those without a head."""
    config = getattr(model, "config", None)
    names = [cls.__name__ for cls in type(model).__mro__]
    if config is None or "PreTrainedModel" not in names:
        return None
    takes = arguments_of(model)
    if not type(model).forward.__module__.startswith("transformers.") or "_loss_function" in vars(model):
        return "own" if own_labels(model) else None  # somebody's own forward or loss, whatever the class is called
    found = next((task for ends, task in _BY_CLASS if any(n.endswith(ends) for n in names)), None)
    if found == "classes":
        kind = getattr(config, "problem_type", None)
        if kind == "regression" or (kind is None and getattr(config, "num_labels", 2) == 1):
            return "regression"
        return "multi-label" if kind == "multi_label_classification" else "classification"
    if found == "generation":
        return "seq2seq-lm" if getattr(config, "is_encoder_decoder", False) else "causal-lm"
    if found == "segmentation" and getattr(config, "num_labels", 2) == 1:
        return "own"
    if found == "span":
        return "question-answering" if "start_positions" in takes else "own"
    if found is not None:
        return found
    if "return_loss" in takes:
        return "contrastive"
    return "own" if own_labels(model) else None


def _headless(model: Any) -> bool:
    """Whether a model of transformers or timm is known to end in features."""
    if "PreTrainedModel" in [cls.__name__ for cls in type(model).__mro__]:
        return _by_class(model) is None
    return hasattr(model, "pretrained_cfg") and getattr(model, "num_classes", None) == 0


def _check_mask(task: Task, batch: Any) -> None:
    """Raise InvalidArgument where labels of a plain tuple look like an attention mask."""
    if isinstance(batch, Mapping) or "attention_mask" not in task.signature.names:
        return
    args, kwargs, labels = task.parts(batch)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() < 2 or len(args) != 1 or kwargs:
        return
    if getattr(args[0], "shape", None) == labels.shape and bool(((labels == 0) | (labels == 1)).all()):
        raise InvalidArgument(
            "the second part of a batch may be labels or an attention mask; "
            "give a dict, {'input_ids': …, 'attention_mask': …, 'labels': …}"
        )


def by_labels(output: Any, labels: Any, inputs: Tensor | None = None) -> Task:
    """The task that labels and an output of a network fit, where only one does.

    Args:
        output: What the network returned.
        labels: Labels as tensors, nested as the outputs or one for all.
        inputs: The first input, to know labels that repeat it (causal language models).

    Raises:
        InvalidArgument: Several tasks fit, or none; the error names the choices.
    """
    found = tensors_in(output)
    if not isinstance(labels, Tensor):
        wanted = leaves(labels)
        if not wanted or not all(isinstance(x, Tensor) for x in wanted.values()):
            raise _no_task(labels, found)
        if set(wanted) != set(found):
            raise InvalidArgument(
                f"labels {', '.join(wanted)} do not match the outputs {', '.join(found)}; give Task.custom(loss=…)"
            )
        return Heads({key: by_labels(found[key], wanted[key], inputs) for key in found})
    head = found.get("logits")
    if head is None and len(found) == 1:
        head = next(iter(found.values()))
    if head is None:
        raise InvalidArgument(
            f"the output holds {', '.join(found) or 'no tensor'}, and there is one tensor of labels: give a task that "
            "says which it is for, as in hub_mpq.tasks.Classification(output=…), or Task.custom(loss=…)"
        )
    choices = fitting(head, labels, inputs)
    if len(choices) != 1:
        raise _unsure(head, labels, choices)
    if choices[0] != "regression" and _probabilities(head, sums_to_one=choices[0] != "multi-label"):
        raise InvalidArgument(
            f"the output looks like probabilities, and {choices[0]} takes logits: leave the last sigmoid or softmax "
            "out of the network, name a task by task=, or give Task.custom(loss=…)"
        )
    return tasks.get(choices[0])  # type: ignore[no-any-return]


def _probabilities(y: Tensor, *, sums_to_one: bool) -> bool:
    """Whether all values lie between 0 and 1, and if so asked those of one sample's (or pixel's) classes sum to one."""
    if not y.numel() or not bool(((y >= 0) & (y <= 1)).all()):
        return False
    return not sums_to_one or any(bool(((y.float().sum(d) - 1).abs() < 1e-3).all()) for d in {1, y.dim() - 1})


def fitting(y: Tensor, labels: Tensor, inputs: Tensor | None = None) -> list[str]:
    """Names of the tasks that labels may mean for an output; of one alone it is certain."""
    same = squeezed(y.shape) == squeezed(labels.shape) and y.shape[:1] == labels.shape[:1]
    if not same:
        if labels.is_floating_point() or y.dim() < 2:
            return []
        return _numbered(y, labels, inputs)
    several = y.dim() == 2 and y.shape[1] > 1
    values = labels.detach().double()
    binary = bool(((values == 0) | (values == 1)).all())
    sums_to_one = several and bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < 1e-2).all())
    if binary:
        if several:
            return ["classification", "multi-label"] if sums_to_one else ["multi-label"]
        return ["multi-label", "regression"]
    if not labels.is_floating_point():
        return ["regression"]
    if sums_to_one:
        return ["classification"]
    return ["multi-label", "regression"] if values.unique().numel() == 2 else ["regression"]


def _numbered(y: Tensor, labels: Tensor, inputs: Tensor | None) -> list[str]:
    """As `fitting`, for class numbers."""
    if y.dim() == 2:
        alone = labels.dim() == 1 or (labels.dim() == 2 and labels.shape[1] == 1)
        return ["classification"] if alone and labels.shape[0] == y.shape[0] and y.shape[1] > 1 else []
    pixels = labels.squeeze(1) if labels.dim() == y.dim() and labels.shape[1] == 1 else labels
    maps = pixels.shape == (y.shape[0], *y.shape[2:])
    tokens = labels.shape == y.shape[:-1]
    if maps and y.dim() > 3:
        return ["segmentation"]
    if tokens and inputs is not None and labels.shape == inputs.shape:
        known = labels >= 0
        if bool(known.any()) and torch.equal(labels[known], inputs[known].to(labels)):
            return ["causal-lm"]
    return ["segmentation"] * maps + ["token-classification"] * tokens


def _unsure(y: Tensor, labels: Tensor, choices: list[str]) -> InvalidArgument:
    said = f"labels of shape {tuple(labels.shape)} ({str(labels.dtype).removeprefix('torch.')})"
    if choices:
        names = " or ".join(f"task={name!r}" for name in choices)
        return InvalidArgument(f"{said} may mean several tasks for an output of shape {tuple(y.shape)}: give {names}")
    return InvalidArgument(
        f"{said} do not fit an output of shape {tuple(y.shape)} in any task that is certain; give task= one of "
        f"{', '.join(tasks.names())}, or Task.custom(loss=…)"
    )


def _no_task(labels: Any, found: Mapping[str, Tensor]) -> InvalidArgument:
    return InvalidArgument(
        f"labels of type {type(labels).__name__} have no known meaning for an output of {', '.join(found)}; "
        "give Task.custom(loss=…)"
    )
