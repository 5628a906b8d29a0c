"""Second moments of layer inputs, which determine the output error that a weight error causes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import LayerSpec
from ..core.layer_kind import layer_kinds
from ..cost.size import channel_count
from ..errors import InvalidArgument
from .block_walk import BlockWalk
from .blocks import block_with, blocks_of, cache_off
from .experts import Stack
from .layers import first_operand
from .split_experts import stack_and_expert

POSITIONS = 4096
LIMIT = 1 << 30
_COLUMNS = 256  # products are symmetric: they are computed in strips of this many columns, without the part above


class LayerMoments(NamedTuple):
    """Some layers of a model and {layer: moments of its input}, without layers that no batch reached. Layers that read
    the same tensor share one tensor of moments. `unreached`: {layer of experts: number of its matrices that no token
    reached}, without zeros; these get the moments of the whole stack."""

    layers: tuple[LayerSpec, ...]
    moments: dict[str, Tensor]
    unreached: dict[str, int]


def input_moments(
    model: nn.Module,
    layers: Iterable[LayerSpec],
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Any],
    *,
    diagonal: bool = False,
    mask: Callable[[Any], Tensor | None] | None = None,
    positions: int = POSITIONS,
    limit: int = LIMIT,
) -> Iterator[LayerMoments]:
    """Compute second moments H = mean of x xᵀ of the inputs of layers, some layers at a time.

    The blocks of a deep model (`blocks_of`) run one after the other on hidden states that are kept for all batches, so
    that memory does not grow with depth (our construction). The other arguments of a block come from a forward in which
    blocks return their input. If that does not reproduce the model (the outputs of each block on the first batch are
    compared with those of a real forward), and for layers outside blocks, the whole model runs.

    Do not change weights until the iterator is exhausted.

    Args:
        model: A float model, or one whose quantizers are off.
        layers: The layers, in order of depth. Convolutions and layers that read indices have no moments and are
            skipped.
        batches: The batches to run the model on; all are used.
        run: `run(model, batch)` runs the model.
        diagonal: Compute only the diagonals of H.
        mask: `mask(batch)` returns which positions count, [batch, tokens], or None for all. For a layer whose input is
            not laid out in positions, also not flattened ones, everything counts.
        positions: Total number of rows x to use per input, evenly spaced over the batches.
        limit: Maximum bytes of moments to hold at a time, for layers outside blocks.

    Yields:
        Layers and their moments, float32: for linear layers H [in, in] or its diagonal [in], for stacks of experts
        [experts, in, in] or [experts, in], each over the tokens that reach the expert. Blocks come first, in order of
        depth.

    Raises:
        InvalidArgument: The input of a layer contains NaN or infinite values.
    """
    called = [layer for layer in layers if not layer_kinds.get(layer.kind).reads_indices]
    blocks = blocks_of(model, {layer.name: layer.weight_count for layer in called})
    rest = {layer.name: layer for layer in called if layer.takes_groups}
    per_batch = max(-(-positions // max(len(batches), 1)), 1)

    def inputs(of: Iterable[LayerSpec]) -> _Inputs:
        return _Inputs(model, tuple(of), diagonal, per_batch, mask)

    walk = None
    if blocks and len(batches):
        with _calm(model):
            walk = BlockWalk.start(model, blocks, batches, run)
    if walk is not None:
        for name in walk.order:
            held = inputs(layer for layer in rest.values() if block_with([name], layer.name))
            with _calm(model), held:
                same = walk.step(name, held.read)
            if not same:
                walk = None
                break
            yield held.found()
            for layer in held.layers:
                del rest[layer.name]
            del held
    for part in _parts(model, rest.values(), diagonal, limit):
        held = inputs(part)
        with _calm(model), held:
            for i, batch in enumerate(batches):
                held.read(batch)
                if walk is None:
                    run(model, batch)
                else:
                    walk.run_around(i)
        yield held.found()


@contextmanager
def _calm(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients and caches, then restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), cache_off(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _parts(model: nn.Module, layers: Iterable[LayerSpec], diagonal: bool, limit: int) -> Iterator[list[LayerSpec]]:
    """Split layers into parts whose moments take at most `limit` bytes, with at least one layer or one stack each."""
    part: list[LayerSpec] = []
    sizes: dict[str, int] = {}
    last = None
    for layer in layers:
        stack, _ = stack_and_expert(model, layer.name) or (None, 0)
        columns = layer.weight_count // channel_count(layer.kind, layer.weight_shape)
        size = 4 * columns * (1 if diagonal else columns) * _experts(layer)
        full = part and sum(sizes.values()) + (0 if layer.buffer in sizes else size) > limit
        if full and (stack is None or stack != last):
            yield part
            part, sizes = [], {}
        last = stack
        part.append(layer)
        sizes[layer.buffer] = size
    if part:
        yield part


def _long(shape: Sequence[int]) -> list[int]:
    """A shape without axes of one element."""
    return [size for size in shape if size > 1]


def _experts(layer: LayerSpec) -> int:
    """Number of matrices in a stack; 1 for any other layer."""
    return math.prod(layer.weight_shape[:-2]) if layer_kinds.get(layer.kind).channel_axis < 0 else 1


class _Inputs:
    """Hooks that, while entered, accumulate the moments of layer inputs, once per tensor."""

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[LayerSpec, ...],
        diagonal: bool,
        positions: int,
        mask: Callable[[Any], Tensor | None] | None,
    ) -> None:
        self.model, self.layers, self.diagonal, self.positions, self.mask = model, layers, diagonal, positions, mask
        self.sums: dict[str | tuple[str, int], Tensor] = {}
        self.counts: dict[str | tuple[str, int], int] = {}
        self.split: dict[str, tuple[str, int]] = {}
        self.kept: Tensor | None = None
        self.stack = ExitStack()

    def __enter__(self) -> _Inputs:
        readers: dict[str, str] = {}
        for layer in self.layers:
            if part := stack_and_expert(self.model, layer.name):
                self.split[layer.name] = part

            def hook(module: nn.Module, args: Any, kwargs: Any, layer: LayerSpec = layer, part: Any = part) -> None:
                x = first_operand(args, kwargs)
                if isinstance(module, Stack):
                    self.add_expert(part or (layer.name, args[1]), x, *args[2:])
                elif readers.setdefault(layer.buffer, layer.name) == layer.name:  # the first that runs
                    self.add(layer.buffer, x)

            module = self.model.get_submodule(layer.name)
            self.stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def read(self, batch: Any) -> None:
        """Set the batch that runs next."""
        self.kept = None if self.mask is None else self.mask(batch)

    def add(self, key: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.kept is not None and _long(x.shape[:-1]) in (_long(self.kept.shape), [self.kept.numel()]):
            rows = rows[self.kept.to(x.device).reshape(-1)]
        self.add_rows(key, rows)

    def add_expert(self, part: tuple[str, int], x: Tensor, tokens: Tensor, count: int) -> None:
        if self.kept is not None and self.kept.numel() == count:
            x = x[self.kept.to(x.device).reshape(-1)[tokens]]
        self.add_rows(part, x)

    def add_rows(self, key: str | tuple[str, int], x: Tensor) -> None:
        step = -(-len(x) // self.positions)
        x = x[:: step if step < 2 else step | 1].float()  # an odd step does not align with positions
        count, columns = x.shape
        if key not in self.sums:
            self.sums[key] = x.new_zeros((columns,) if self.diagonal else (columns, columns))
        total = self.sums[key]
        if self.diagonal:
            total += x.square().sum(0)
        else:
            for end in range(_COLUMNS, columns + _COLUMNS, _COLUMNS):
                strip = slice(end - _COLUMNS, end)
                total[strip, :end].addmm_(x[:, strip].t(), x[:, :end])
        self.counts[key] = self.counts.get(key, 0) + count

    def found(self) -> LayerMoments:
        """Return the means over positions."""
        means: dict[str, Tensor] = {}
        parts = {x.name: self.parts(x) for x in self.layers if layer_kinds.get(x.kind).channel_axis < 0}
        missing = {name: [part for part in found if not self.counts.get(part)] for name, found in parts.items()}
        short = {stack for found in missing.values() for stack, _ in found}
        every = {stack: mean for stack in sorted(short) if (mean := self.of_all_tokens(stack)) is not None}
        for layer in self.layers:
            key = layer.buffer
            if layer.name in parts:
                stack = parts[layer.name][0][0]
                if stack not in short or stack in every:
                    means[key] = self.stacked(layer, parts[layer.name], every.get(stack))
            elif key not in means and self.counts.get(key):
                means[key] = self.mean(layer.name, self.sums.pop(key), self.counts[key])
        moments = {layer.name: means[layer.buffer] for layer in self.layers if layer.buffer in means}
        return LayerMoments(self.layers, moments, {name: len(found) for name, found in missing.items() if found})

    def parts(self, layer: LayerSpec) -> list[tuple[str, int]]:
        """(stack, expert) of the matrices of a layer."""
        if layer.name in self.split:
            return [self.split[layer.name]]
        return [(layer.name, expert) for expert in range(_experts(layer))]

    def of_all_tokens(self, stack: str) -> Tensor | None:
        """The moments over the inputs of all experts of a stack; None if no token reached any."""
        reached = [key for key in self.sums if isinstance(key, tuple) and key[0] == stack and self.counts.get(key)]
        if not reached:
            return None
        whole = torch.stack([self.sums[key] for key in reached]).sum(0)
        return self.mean(stack, whole, sum(self.counts[key] for key in reached))

    def mean(self, name: str, total: Tensor, count: int) -> Tensor:
        mean = total.div_(count)
        if not self.diagonal:
            for i in range(0, len(mean), _COLUMNS):
                strip = slice(i, i + _COLUMNS)
                mean[:i, strip] = mean[strip, :i].t()
        if not bool(torch.isfinite(mean).all()):
            raise InvalidArgument(f"the input of layer {name!r} contains NaN or infinite values")
        return mean

    def stacked(self, layer: LayerSpec, parts: list[tuple[str, int]], every: Tensor | None) -> Tensor:
        """The moments of a layer's experts; for those that no token reached, the mean over all tokens."""
        first = next(x for x in (*(self.sums.get(part) for part in parts), every) if x is not None)
        out = first.new_empty((len(parts), *first.shape))
        for i, part in enumerate(parts):
            out[i] = self.mean(layer.name, self.sums.pop(part), self.counts[part]) if self.counts.get(part) else every
        return out
