"""Count multiply-accumulates of torch operators below autograd, per module that runs them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_GROUPED = ("_grouped_mm", "grouped_mm_fallback")
"""torch's product with stacked matrices, and the fallback of transformers where torch has no kernel for it."""
_LARGE = 2**14
"""Number of elements from which floats are not computed on stand-ins."""


def operands_and_macs(name: str, args: tuple[Any, ...], out: Any) -> tuple[tuple[Tensor, ...], int]:
    """The multiplied tensors and the MACs of one aten operator; ((), 0) if it multiplies no matrices.

    A convolution counts its actual output area (floored) times kernel and input channels per group; a transposed one
    uses the input area. Attention counts both products, masked or not; a bilinear layer counts its weights once per
    row; a table of distances counts as a product of both sides. Additions and element-wise work count nothing.
    """
    if name in _GROUPED:  # each row meets one of the stacked matrices
        a, b = args[:2]
        rows = a.shape[-2:].numel() if (a.ndim, b.ndim) == (3, 2) else a.numel()
        return (a, b), rows * b.shape[-1]
    if name in ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"):
        a, b = args[1:3] if "add" in name else args[:2]
        return (a, b), a.numel() * (b.shape[-1] if b.ndim >= 2 else 1)
    if name in ("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution"):
        x, w = args[:2]
        transposed = len(args) > 6 and args[6] is True
        return (x, w), (x.numel() if transposed else out.numel()) * w.shape[1:].numel()
    if name.startswith("_scaled_dot_product"):
        q, k, v = args[:3]  # [batch, heads, length, features]
        return (q, k, v), q.numel() * k.shape[-2] + q.shape[:-1].numel() * k.shape[-2] * v.shape[-1]
    if name in ("_cdist_forward", "_euclidean_dist"):
        return (args[0], args[1]), out.numel() * args[0].shape[-1]
    if name == "_trilinear":  # of nn.Bilinear: its weight [outputs, first features, second features] is in the middle
        return args[:3], out.numel() * args[1].shape[1:].numel()
    if name in ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"):  # x [time, batch, features], then its weights
        weights = args[1:3] if name == "mkldnn_rnn_layer" else tuple(w for w in args[1] if w.ndim == 2)
        return (args[0], *weights), args[0].shape[:-1].numel() * sum(w.numel() for w in weights)
    return (), 0


def reads_values(func: Any, name: str) -> bool:
    """Whether an aten operator uses the values of its tensors rather than only their shape, dtype or memory."""
    returns, changes = func._schema.returns, func._schema.is_mutable
    views = not changes and any(r.alias_info is not None for r in returns)
    return not (views or name.startswith("new_") or name.endswith("_like"))


def storage_key(tensor: Tensor) -> int:
    """Equal for a tensor and its views."""
    return int(tensor.untyped_storage()._cdata)


class PartsInMemory:
    """Which Parameters and buffers a tensor shares memory with; several of them may be views of one buffer."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._held: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for name, tensor in named.items():
            self._held[storage_key(tensor)].append((*_span(tensor), name))
        for held in self._held.values():
            held.sort(key=lambda x: x[1] - x[0])

    def of(self, tensor: Tensor) -> tuple[str, ...]:
        """Their names, the smallest first."""
        held = self._held.get(storage_key(tensor), ())
        if not held:
            return ()
        begin, end = _span(tensor)
        return tuple(name for first, last, name in held if begin < last and first < end)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after its last."""
    begin, size = int(tensor.storage_offset()), tensor.element_size()
    if not tensor.numel():
        return begin * size, begin * size
    steps = int(sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)))
    return begin * size, (begin + steps + 1) * size


def _grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Zeros in the shape and dtype of the output of `_grouped_mm`.

    `offs` splits the axis that only one operand has into groups: rows of `a`, columns of `b` or, if both are matrices,
    the summed axis.
    """
    groups = [] if a.ndim != b.ndim else [b.shape[0] if b.ndim == 3 else offs.shape[0]]  # type: ignore[union-attr]
    return a.new_zeros([*groups, a.shape[-2], b.shape[-1]], dtype=out_dtype)


def _is_stand_in(x: Tensor) -> bool:
    """Whether floats are zeros that take no memory."""
    steps = [step for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]
    return x.is_floating_point() and bool(steps) and not any(steps)


def _answer(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The output of an operator on stand-ins: zeros that take no memory instead of large floats, whose values are
    meaningless; its real output for integers and masks, which may decide what runs."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(x.is_meta for x in tensors) or not any(_is_stand_in(x) for x in tensors):
        return func(*args, **kwargs)
    first = args[0] if args else None
    if func._schema.name.endswith("_") and isinstance(first, Tensor) and _is_stand_in(first):
        torch.autograd.graph.increment_version(first)
        return first
    large = any(x.is_floating_point() and x.numel() >= _LARGE for x in tensors)
    if not large or any(r.alias_info is not None for r in func._schema.returns):
        return func(*args, **kwargs)
    on_meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    try:
        shapes = func(*on_meta[0], **on_meta[1])
    except (RuntimeError, NotImplementedError):  # its shape depends on values, or has no meta kernel
        return func(*args, **kwargs)
    if any(not x.is_floating_point() for x in tree_leaves(shapes) if isinstance(x, Tensor)):
        return func(*args, **kwargs)
    return tree_map(lambda x: _nothing(x, tensors[0].device) if isinstance(x, Tensor) else x, shapes)


def _nothing(like: Tensor, device: torch.device) -> Tensor:
    """Zeros of a tensor's shape and dtype; large ones take no memory."""
    shape = () if like.numel() >= _LARGE else like.shape
    return torch.zeros(shape, dtype=like.dtype, device=device).expand(like.shape)


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products while it is entered.

    `where`: names of the running modules, the innermost last. `named`: Parameters and buffers by name.
    `stand_ins`: whether tensors have shapes but no values (meta, or zeros that take no memory). If so, large floats are
    not computed, and neither are grouped products, whose kernels reject the dtype or strides of such tensors.
    `macs`: {(module name, name of the Parameter or buffer that takes part or "", fused attention): MACs}.
    `uses`: (names of the Parameters or buffers whose values an operator reads from one tensor, names of the modules
    running at that time).
    """

    def __init__(self, where: list[str], named: Mapping[str, Tensor], *, stand_ins: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where, self.parts, self.stand_ins = where, PartsInMemory(named), stand_ins
        self.macs: Counter[tuple[str, str, bool]] = Counter()
        self.uses: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if self.stand_ins and name in _GROUPED:
            out = _grouped_product(*args, **(kwargs or {}))
        elif self.stand_ins and name != "embedding":  # it checks its indices
            out = _answer(func, args, kwargs or {})
        else:
            out = func(*args, **(kwargs or {}))
        if reads_values(func, name):
            given = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self.uses.update((parts, tuple(self.where)) for x in given if (parts := self.parts.of(x)))
        tensors, macs = operands_and_macs(name, args, out)
        if macs:
            part = next((parts[0] for t in tensors if (parts := self.parts.of(t))), "")
            self.macs[self.where[-1], part, "scaled_dot_product" in name] += macs
        return out
