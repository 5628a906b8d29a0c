"""How a batch is passed to a network: which parts are inputs, and which are labels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import InvalidArgument

FORMS = "pass inputs alone, (inputs, labels) or a dict; several inputs as ((first, second), labels)"
PLAIN_LABELS = ("target", "targets", "y")
"""Common keys of labels for networks from outside the libraries, in addition to the task's own keys."""


class Parts(NamedTuple):
    """Positional and keyword arguments of a forward, and labels (None if the batch has none)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any


class Pair(NamedTuple):
    """Two batches for one training step: one to train on, and one held out.

    Args:
        train: The batch that trains the model.
        held: The held-out batch.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import Pair
        >>> step = Pair(train=torch.zeros(8, 3), held=torch.zeros(4, 3))
        >>> step.held.shape
        torch.Size([4, 3])
    """

    train: Any
    held: Any


@dataclass(frozen=True)
class Signature:
    """What a network's forward takes.

    Attributes:
        model: Name of the network's class, for error messages.
        positional: Number of inputs in a batch without names.
        required: Number of inputs that the forward requires.
        most: Maximum number of positional arguments.
        names: Names of its keyword arguments.
        open: Whether it accepts any other keyword too.
        pretrained: Whether it is a transformers model.
        mapping: Whether its only input is a dict.
    """

    model: str = "the model"
    positional: int = 1
    required: int = 1
    most: int = 1
    names: tuple[str, ...] = ()
    open: bool = True
    pretrained: bool = False
    mapping: bool = False

    @classmethod
    def of(cls, model: nn.Module, example: Any = None) -> Signature:
        """Read the signature of a network.

        Args:
            model: The network.
            example: One example input, if available: a tensor, a tuple of arguments or a dict.
        """
        model = inner(model)
        found = tuple(arguments_of(model).values())
        plain = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = max(sum(p.default is p.empty for p in plain), 1)
        several = isinstance(example, Sequence) and not isinstance(example, (str, Tensor))
        pretrained = hasattr(model, "config") and hasattr(model, "base_model_prefix")
        more = not found or any(p.kind is p.VAR_KEYWORD for p in found)
        if pretrained and not type(model).__name__.endswith("EncoderDecoderModel"):
            more = False  # it ignores unknown keywords, except an encoder-decoder that passes them on to its halves
        alone = several and len(example) == 1 and isinstance(example[0], Mapping)
        return cls(
            model=type(model).__name__,
            positional=len(example) if several else required,
            required=required,
            most=10**6 if not found or any(p.kind is p.VAR_POSITIONAL for p in found) else len(plain),
            names=tuple(p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)),
            mapping=alone,
            open=more,
            pretrained=pretrained,
        )

    def split(self, batch: Any, label_keys: Sequence[str]) -> Parts:
        """Split a batch into inputs and labels.

        Args:
            batch: A tensor or array (inputs alone), a tuple (inputs, labels), or a dict of keyword arguments with
                labels under one of `label_keys`.
            label_keys: Keys under which a dict holds labels.

        Raises:
            InvalidArgument: A part of the batch is neither an input nor labels.
        """
        if isinstance(batch, Pair):
            batch = batch.train
        if isinstance(batch, Mapping) and not self.mapping:
            return self._of_mapping(batch, label_keys)
        if not isinstance(batch, (tuple, list)):
            return Parts(*self._inputs(batch, label_keys), None)
        if not batch:
            raise InvalidArgument(f"the batch is empty; {FORMS}")
        nested = isinstance(batch[0], (tuple, list, Mapping))
        if not nested and self.positional > 1:
            if len(batch) == self.positional + 1:
                return Parts(*self._inputs(batch[:-1], label_keys), labels_from(batch[-1]))
            if len(batch) == self.positional and self.required < len(batch) == 2:
                raise InvalidArgument(
                    "a batch of two tensors is ambiguous: it may be two inputs, or an input and its labels; "
                    "pass ((first, second),) or ((first, second), labels)"
                )
            if len(batch) == self.positional:
                return Parts(*self._inputs(batch, label_keys), None)
        if len(batch) > 2:
            count = "1 input" if self.positional == 1 else f"{self.positional} inputs"
            raise InvalidArgument(f"the batch has {len(batch)} parts, but {self.model} takes {count}; {FORMS}")
        labels = labels_from(batch[1]) if len(batch) == 2 else None
        return Parts(*self._inputs(batch[0], label_keys), labels)

    def _inputs(self, part: Any, label_keys: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(part, Mapping) and self.mapping:
            return (as_tensors(part),), {}
        if isinstance(part, Mapping):
            found = self._of_mapping(part, label_keys)
            if found.labels is not None:
                raise InvalidArgument("got labels twice, inside the dict of inputs and next to it; pass them once")
            return found.args, found.kwargs
        if isinstance(part, (tuple, list)) and (len(part) <= self.most or self.positional > 1):
            if not self.required <= len(part) <= self.most:
                raise InvalidArgument(f"the batch has {len(part)} inputs, but {self.model} takes {self.positional}")
            return tuple(as_tensors(x) for x in part), {}
        if not tree_leaves_of(part, (Tensor, np.ndarray)):
            raise InvalidArgument(f"a batch of type {type(part).__name__} contains no tensor; {FORMS}")
        return (as_tensors(part),), {}

    def _of_mapping(self, batch: Mapping[str, Any], label_keys: Sequence[str]) -> Parts:
        keys = (*label_keys, *(k for k in PLAIN_LABELS if not self.pretrained and k not in self.names))
        labels = {k: labels_from(v) for k, v in batch.items() if k in keys and v is not None}
        inputs = {k: as_tensors(v) for k, v in batch.items() if k not in keys}
        unknown = [
            k
            for k, v in inputs.items()
            if k not in self.names
            and not self.open
            and not (self.pretrained and isinstance(v, (bool, int, float, type(None))))
        ]
        if unknown:
            takes = ", ".join(n for n in self.names if n not in keys)
            raise InvalidArgument(
                f"unexpected {', '.join(map(repr, unknown))} in the batch: {self.model} takes {takes}, and labels are "
                f"looked up under {', '.join(keys)}; remove it, or name the keys of your labels with label_keys="
            )
        if not labels:
            return Parts((), inputs, None)
        return Parts((), inputs, next(iter(labels.values())) if len(labels) == 1 else labels)


def arguments_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """{name: argument} of the forward inside all wrappers; {} if it has no signature, as in TorchScript."""
    try:
        return inspect.signature(inner(model).forward).parameters
    except ValueError:
        return {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients, then restore the mode of each of its modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def inner(model: nn.Module) -> Any:
    """The network inside torch.compile's or PEFT's wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def tree_leaves_of(tree: Any, kinds: type | tuple[type, ...]) -> list[Any]:
    """Leaves of a nested batch that have one of the given types."""
    if isinstance(tree, Mapping):  # transformers' BatchEncoding is not a dict
        return [leaf for value in tree.values() for leaf in tree_leaves_of(value, kinds)]
    if isinstance(tree, (tuple, list)):
        return [leaf for value in tree for leaf in tree_leaves_of(value, kinds)]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, kinds)]


def as_tensors(tree: Any) -> Any:
    """A nested batch with numeric NumPy arrays converted to tensors; everything else is unchanged."""
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biuf":
        return torch.as_tensor(tree)
    if isinstance(tree, Mapping):
        return {k: as_tensors(v) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(as_tensors(v) for v in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(as_tensors(v) for v in tree)
    return tree


def labels_from(value: Any) -> Any:
    """Convert labels to tensors: arrays and lists of numbers, also inside tuples, lists and dicts.

    Raises:
        InvalidArgument: The labels are not numbers.
    """
    if isinstance(value, Tensor):
        return value.long() if value.dtype in (torch.uint16, torch.uint32, torch.uint64) else value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.ndarray) or np.isscalar(value):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise InvalidArgument(f"labels must be numbers, got {str(value)[:40]!r}")
        return torch.as_tensor(array.astype(np.int64) if array.dtype.kind == "u" else array)
    if isinstance(value, Mapping):
        return {k: labels_from(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        numbers = _numbers(value)
        return [labels_from(v) for v in value] if numbers is None else numbers
    raise InvalidArgument(f"labels must be tensors, arrays or lists of numbers, got {type(value).__name__}")


def _numbers(value: Sequence[Any]) -> Tensor | None:
    """A list of numbers, or of equally long lists of numbers, as a tensor; None for anything else."""
    leaves = tree_leaves(list(value))
    scalars = (bool, int, float, np.integer, np.floating, np.bool_)
    if leaves and all(isinstance(x, Tensor) and not x.dim() for x in value):
        return torch.stack(list(value))
    if not leaves or not all(isinstance(x, scalars) for x in leaves) or any(isinstance(x, Mapping) for x in value):
        return None
    try:
        return torch.as_tensor(np.asarray(value)) if isinstance(leaves[0], np.generic) else torch.tensor(value)
    except ValueError:
        return None


def to_device(batch: Any, device: torch.device) -> Any:
    """Move all tensors and arrays of a batch to a device.

    Args:
        batch: Tensors and arrays, nested in tuples, lists and dicts. Arrays become tensors; everything else is kept.
        device: Where to put them.

    Returns:
        The batch with the same nesting; mappings become plain dicts.

    Example:
        >>> import numpy as np, torch
        >>> from hub_mpq.tasks import to_device
        >>> to_device({"x": np.zeros(2), "id": "a"}, torch.device("cpu"))
        {'x': tensor([0., 0.], dtype=torch.float64), 'id': 'a'}
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        found = as_tensors(batch)
        return found.to(device) if isinstance(found, Tensor) else found
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(v, device) for v in batch)
    return batch


def size_of(batch: Any) -> int:
    """Number of samples in a batch: the first axis of its first tensor. For a pair, in both batches together."""
    if isinstance(batch, Pair):
        return size_of(batch.train) + size_of(batch.held)
    first = next((x for x in tree_leaves_of(batch, (Tensor, np.ndarray)) if x.ndim), None)
    return 1 if first is None else int(first.shape[0])
