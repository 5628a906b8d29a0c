"""Find the task of a model: from its class, else from its labels and output where these leave no doubt."""

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
"""A task, its name, or None to detect it."""

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
"""(suffixes of class names in transformers, task)."""


def task_of(task: TaskLike, model: nn.Module, batch: Any = None, example: Any = None) -> Task:
    """Choose the task of a model and bind it to the model.

    Args:
        task: A task or its name; None to detect it.
        model: The network, not wrapped.
        batch: A batch that will be used, with its labels if it has any; None to decide from the model alone.
        example: One example input of the network, if available.

    Returns:
        The task, bound to the model.

    Raises:
        InvalidArgument: The name is unknown, or the labels fit several tasks or none; the error lists the choices.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import task_of
        >>> net = torch.nn.Flatten()
        >>> task_of(None, net, (torch.zeros(2, 5), torch.tensor([0, 4]))).name
        'classification'
        >>> task_of("regression", net).name
        'regression'
    """
    if isinstance(task, str):
        task = tasks.get(task)
    if task is not None:
        if not isinstance(task, Task):
            raise InvalidArgument(f"task must be a name or an instance of hub_mpq.Task, got {type(task).__name__}")
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
            f"{type(inner(model)).__name__} has no head, so its output is features that labels cannot be compared "
            "with; load it with a head, remove the labels, or choose a task with task="
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
    """Name of the task of a transformers model; None for other networks and for models without a head."""
    config = getattr(model, "config", None)
    names = [cls.__name__ for cls in type(model).__mro__]
    if config is None or "PreTrainedModel" not in names:
        return None
    takes = arguments_of(model)
    if not type(model).forward.__module__.startswith("transformers.") or "_loss_function" in vars(model):
        return "own" if own_labels(model) else None  # a custom forward or loss, whatever the name of the class
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
    """Raise InvalidArgument if the labels of a plain tuple look like an attention mask."""
    if isinstance(batch, Mapping) or "attention_mask" not in task.signature.names:
        return
    args, kwargs, labels = task.parts(batch)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() < 2 or len(args) != 1 or kwargs:
        return
    if getattr(args[0], "shape", None) == labels.shape and bool(((labels == 0) | (labels == 1)).all()):
        raise InvalidArgument(
            "the second part of the batch may be labels or an attention mask; "
            "pass a dict {'input_ids': …, 'attention_mask': …, 'labels': …}"
        )


def by_labels(output: Any, labels: Any, inputs: Tensor | None = None) -> Task:
    """The only task that fits the labels and the output of a network.

    Args:
        output: What the network returned.
        labels: Labels as tensors, nested like the outputs or a single tensor.
        inputs: The first input, to recognize labels that repeat it (causal language models).

    Raises:
        InvalidArgument: Several tasks fit, or none; the error lists the choices.
    """
    found = tensors_in(output)
    if not isinstance(labels, Tensor):
        wanted = leaves(labels)
        if not wanted or not all(isinstance(x, Tensor) for x in wanted.values()):
            raise _no_task(labels, found)
        if set(wanted) != set(found):
            raise InvalidArgument(
                f"labels {', '.join(wanted)} do not match the outputs {', '.join(found)}; use Task.custom(loss=…)"
            )
        return Heads({key: by_labels(found[key], wanted[key], inputs) for key in found})
    head = found.get("logits")
    if head is None and len(found) == 1:
        head = next(iter(found.values()))
    if head is None:
        raise InvalidArgument(
            f"the output contains {', '.join(found) or 'no tensor'}, but there is one tensor of labels; choose the "
            "output with a task such as hub_mpq.tasks.Classification(output=…), or use Task.custom(loss=…)"
        )
    choices = fitting(head, labels, inputs)
    if len(choices) != 1:
        raise _unsure(head, labels, choices)
    if choices[0] != "regression" and _probabilities(head, sums_to_one=choices[0] != "multi-label"):
        raise InvalidArgument(
            f"the output looks like probabilities, but task {choices[0]!r} expects logits; remove the final sigmoid "
            "or softmax from the network, choose a task with task=, or use Task.custom(loss=…)"
        )
    return tasks.get(choices[0])  # type: ignore[no-any-return]


def _probabilities(y: Tensor, *, sums_to_one: bool) -> bool:
    """Whether all values lie between 0 and 1 and, with `sums_to_one`, those of each sample or pixel sum to one."""
    if not y.numel() or not bool(((y >= 0) & (y <= 1)).all()):
        return False
    return not sums_to_one or any(bool(((y.float().sum(d) - 1).abs() < 1e-3).all()) for d in {1, y.dim() - 1})


def fitting(y: Tensor, labels: Tensor, inputs: Tensor | None = None) -> list[str]:
    """Names of the tasks that fit the labels and the output; a single name is certain."""
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
    """As `fitting`, for class indices."""
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
        return InvalidArgument(f"{said} fit several tasks for an output of shape {tuple(y.shape)}; pass {names}")
    return InvalidArgument(
        f"no task can be detected for {said} and an output of shape {tuple(y.shape)}; choose task= from "
        f"{', '.join(tasks.names())}, or use Task.custom(loss=…)"
    )


def _no_task(labels: Any, found: Mapping[str, Tensor]) -> InvalidArgument:
    return InvalidArgument(
        f"no task is known for labels of type {type(labels).__name__} and the outputs {', '.join(found)}; "
        "use Task.custom(loss=…)"
    )
