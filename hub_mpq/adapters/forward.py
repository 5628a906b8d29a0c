"""Record one forward: which layer ran when, on which tensor, and what was multiplied where."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import HubMPQError, InvalidArgument
from ..nn.types import device_of, layer_kind
from ..versions import warn_if_untested
from .count import MacCounter
from .restore_state import state_restored

Example = Mapping[str, Any] | Sequence[Any] | Tensor
"""One batch for a model: keyword arguments, positional arguments, or a single tensor."""


TensorKey = tuple[int, int, int]
"""A tensor object, its number of in-place writes, its number of elements."""


@dataclass(frozen=True)
class Call:
    """One run of a leaf module. `reads` is its first input, `source` the base tensor of that input, `writes` the base
    tensor of its output, `count` the number of elements of its input."""

    name: str
    reads: TensorKey | None
    source: TensorKey | None
    writes: TensorKey | None
    count: int


@dataclass
class ForwardRecord:
    """`calls` in order; `macs` and `uses` as in MacCounter; `batch`: number of samples in the forward."""

    calls: list[Call] = field(default_factory=list)
    macs: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    uses: set[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=set)
    batch: int = 1


def call(model: nn.Module, example: Example) -> Any:
    """Run `model` on `example`."""
    args, kwargs = _arguments(example)
    return model(*args, **kwargs)


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    return ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})


def batch_size(example: Example) -> int:
    """Number of samples in an example: the first axis of its first tensor."""
    return next((t.shape[0] for t in tensors_of(example) if t.ndim), 1)


def tensors_of(example: Example) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]


def watched_forward(model: nn.Module, example: Example) -> ForwardRecord:
    """Run the model once on one sample, on meta tensors where possible, record it, and leave the model unchanged.

    A model whose forward reads values runs on its own Parameters, or on zeros that take no memory if it is on the meta
    device. If one sample alone fails, the whole example is used. Raises HubMPQError with the model's own message if
    nothing works, and InvalidArgument for an example without a batch axis.
    """
    warn_if_untested("torch")
    batch = batch_size(example)
    first = tree_map(lambda x: x[:1] if isinstance(x, Tensor) and x.ndim and x.shape[0] == batch else x, example)
    on_meta = any(p.is_meta for p in model.parameters())
    errors: list[Exception] = []
    for sample in (first, example) if batch > 1 else (example,):
        for way in (_on_meta, _on_zeros if on_meta else _as_is):
            try:
                run = way(model, sample)
                run.batch = batch_size(sample)
                return run
            except _NoBatch as error:
                raise InvalidArgument(str(error)) from None
            except Exception as error:  # a model may raise anything on meta tensors or on a batch of one
                errors.append(error)
    said = f"{type(errors[-1]).__name__}: {str(errors[-1]).strip().partition(chr(10))[0]}"
    raise HubMPQError(f"{type(model).__name__} does not run on the example input [{said}]") from errors[-1]


def _as_is(model: nn.Module, example: Example) -> ForwardRecord:
    named = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return _hooked(model, named, example, lambda: call(model, example))


def _on_meta(model: nn.Module, example: Example) -> ForwardRecord:
    return _instead(model, example, lambda t: torch.empty_like(t, device="meta"), torch.device("meta"))


def _on_zeros(model: nn.Module, example: Example) -> ForwardRecord:
    return _instead(model, example, _zeros(model), _beside(model))


def _beside(model: nn.Module) -> torch.device:
    device = device_of(model)
    return torch.device("cpu") if device.type == "meta" else device


def _zeros(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Zeros that take no memory for Parameters; buffers keep their values, which may be sizes."""
    device = _beside(model)

    def stand_in(t: Tensor) -> Tensor:
        if isinstance(t, nn.Parameter) or t.is_meta:
            return torch.zeros((), dtype=t.dtype, device=device).expand(t.shape)
        return t.to(device)

    return stand_in


def output_on_zeros(model: nn.Module, example: Example) -> Any:
    """The output of a model whose Parameters are replaced by zeros that take no memory; large floats are not computed.

    The output has the right shapes at little cost. Raises whatever the model raises.
    """
    stand_in = _zeros(model)
    swapped = {name: stand_in(t) for name, t in (*model.named_buffers(), *model.named_parameters())}
    args, kwargs = _arguments(tree_map(lambda x: _moved(x, _beside(model)) if isinstance(x, Tensor) else x, example))
    with state_restored(model), MacCounter([""], {}, stand_ins=True):
        return torch.func.functional_call(model, swapped, args, kwargs)


def runs_on_zeros(model: nn.Module, example: Example) -> Exception | None:
    """The error of a model on an example when zeros replace its Parameters and buffers; None if it runs."""
    try:
        _on_zeros(model, example)
    except Exception as error:  # a model may raise anything on an unexpected input
        return error
    return None


def _instead(
    model: nn.Module, example: Example, stand_in: Callable[[Tensor], Tensor], device: torch.device
) -> ForwardRecord:
    """Record a forward with other tensors in place of Parameters and buffers."""
    named = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    swapped = {name: stand_in(tensor) for name, tensor in named.items()}
    example = tree_map(lambda x: _moved(x, device) if isinstance(x, Tensor) else x, example)
    args, kwargs = _arguments(example)
    return _hooked(
        model, swapped, example, lambda: torch.func.functional_call(model, swapped, args, kwargs), stand_ins=True
    )


def _moved(x: Tensor, device: torch.device) -> Tensor:
    return torch.zeros_like(x, device=device) if x.is_meta and device.type != "meta" else x.to(device)


_NO_INPUT = (None, None, 0, None)


class _NoBatch(Exception):
    """A layer reads the example itself as one sample without a batch axis."""


def _check_batch_axis(module: nn.Module, x: Tensor, first: Tensor) -> None:
    """Raise _NoBatch if the batch axis is certainly missing: the input of a layer has the shape of the example's first
    tensor and as many axes as one sample. (A layer may read samples one by one, but then they have one axis less.)"""
    sample = len(module.kernel_size) + 1 if isinstance(module, _ConvNd) else 1 if isinstance(module, nn.Linear) else 0
    if x.ndim == sample and x.shape == first.shape:
        raise _NoBatch(
            f"the example input must start with a batch dimension: {type(module).__name__} reads it as one sample "
            f"of {sample} dimension{'s' * (sample > 1)}"
        )


def _hooked(
    model: nn.Module,
    named: Mapping[str, Tensor],
    example: Example,
    forward: Callable[[], Any],
    *,
    stand_ins: bool = False,
) -> ForwardRecord:
    run, where = ForwardRecord(), [""]
    args, kwargs = _arguments(example)  # a list of tensors may hold samples without a batch axis
    first = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:1]
    names = {module: name for name, module in model.named_modules()}
    tokens: WeakIdKeyDictionary = WeakIdKeyDictionary()
    fresh = itertools.count()
    pending: list[tuple[TensorKey | None, TensorKey | None, int, Tensor | None]] = []
    own_count = {module: kind.macs for module in names if (kind := layer_kind(module)) is not None and kind.macs}
    own_macs: Counter[str] = Counter()

    def key(t: Tensor) -> TensorKey:
        if t not in tokens:
            tokens[t] = next(fresh)
        return tokens[t], t._version, t.numel()  # the version changes with each in-place operation on t

    def view_key(t: Tensor) -> TensorKey:
        return (*key(t if t._base is None else t._base)[:2], t.numel())

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        where.append(names[module])
        inputs = tensors_of((args, kwargs))
        if inputs and first:
            _check_batch_axis(module, inputs[0], first[0])
        pending.append((key(inputs[0]), view_key(inputs[0]), inputs[0].numel(), inputs[0]) if inputs else _NO_INPUT)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        where.pop()
        whole, view, count, x = pending.pop()
        if module in own_count and x is not None:
            own_macs[names[module]] += own_count[module](module, x, out)
        if isinstance(module, _BatchNorm) or not any(True for _ in module.children()):
            run.calls.append(
                Call(names[module], whole, view, view_key(out) if isinstance(out, Tensor) else None, count)
            )

    handles: list[Any] = []
    with state_restored(model):
        try:
            for module in names:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
            with MacCounter(where, named, stand_ins=stand_ins) as counter:
                forward()
        finally:
            for handle in handles:
                handle.remove()
    run.uses = counter.uses
    run.macs = Counter({part: count for part, count in counter.macs.items() if part[0] not in own_macs})
    run.macs.update({(name, "", False): count for name, count in own_macs.items()})
    return run
