"""How far the output moves when one operand of one layer is quantized: the Fisher information's estimate."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument
from ..nn.blocks import blocks_of, cache_off, checkpointed, frozen
from ..nn.experts import Stack
from ..nn.layers import QuantConv1D, QuantLinear, first_operand
from ..nn.split_experts import stack_and_expert
from ..quantizers import LSQ
from ..tasks import Task
from ..train.processes import mean_rows, total, world
from ..train.random_draws import fixed_draws

Rows = dict[str, dict[int, float]]
LEAST = 1e-30
SAMPLES, POSITIONS = 512, 4096
"""How much is read: enough that the number of samples, which bounds the rank of the estimated Fisher information, is
no limit."""


class Sensitivity(NamedTuple):
    """Divergence of the output by layer and width, with the standard error of each, and what it is counted in."""

    weight: Rows
    activation: Rows
    weight_error: Rows
    activation_error: Rows
    unit: str

    def relative_error(self) -> dict[str, float]:
        """{layer: standard error of its two operands' sum at the narrowest widths, over that sum}; none where it is
        unknown (of one sample) or where nothing was found that could spread."""
        out = {}
        for name, row in self.weight.items():
            narrow = [(row, self.weight_error[name])]
            if name in self.activation:
                narrow.append((self.activation[name], self.activation_error[name]))
            value = sum(found[min(found)] for found, _ in narrow)
            out[name] = math.hypot(*(error[min(error)] for _, error in narrow)) / value
        return {name: round(error, 4) for name, error in out.items() if 0 < error < math.inf}


@contextmanager
def at(quantizer: LSQ, bits: int) -> Iterator[None]:
    """One quantizer on at a width, then off."""
    quantizer.set_width(bits)
    try:
        yield
    finally:
        quantizer.set_width(None)


def like(moved: Tensor, y: Tensor) -> Tensor:
    """`moved` with each channel's mean and deviation (dimension 1) brought to those of `y`, as a BatchNorm that reads
    it will once it has seen it. One or two values a channel stay as they are: no error of them would be left."""
    if y.numel() <= 2 * y.shape[1]:
        return moved
    dims = [d for d in range(y.dim()) if d != 1]
    spread = moved.std(dims, correction=0, keepdim=True)
    deviation = torch.where(spread > 0, y.std(dims, correction=0, keepdim=True) / spread, 0.0)
    return (moved - moved.mean(dims, keepdim=True)) * deviation + y.mean(dims, keepdim=True)


def monotone(row: Mapping[Any, float]) -> dict[Any, float]:
    """{width, or LayerBits: value} in which no width has less than a wider one of the same groups, and at
    least what can be stored."""
    out = {bits: max(value, LEAST) for bits, value in sorted(row.items())}
    groups: dict[Any, list[Any]] = {}
    for bits in sorted(out, reverse=True):
        groups.setdefault(None if isinstance(bits, int) else (bits.group_size, bits.symmetric), []).append(bits)
    for wider, bits in (pair for widths in groups.values() for pair in pairwise(widths)):
        out[bits] = max(out[bits], out[wider])
    return out


def counted(items: float) -> float:
    """How many items there are to take a mean over. Raises InvalidArgument when there are none."""
    if not items:
        raise InvalidArgument("no item of the batches counts: their masks leave everything out")
    return items


def sensitivity(
    layers: Mapping[str, Any],
    model: nn.Module,
    batches: Sequence[Any],
    task: Task,
    normed: Collection[str] = (),
    seed: int = 0,
) -> Sensitivity:
    """Estimated divergence from the float model when one operand alone is quantized, a mean over the task's items.

    To second order the divergence is half the square of an error, measured by the Fisher information. For labels drawn
    from the model's own output it is the mean of ½(g·ΔY)²: Y is the layer's output, ΔY what quantizing its weight or
    its input changes in it, and g the gradient of −log p(label). `Task.probe` is such a random value of every item,
    also for tasks without a distribution, whose divergence is a squared error. So all layers and operands are counted
    in one unit, the task's divergence, and their sum estimates a policy's.

    A weight's errors at all places of an image add up, so g·ΔY is summed over each sample. Where the items are
    positions themselves (tokens, pixels: `Task.positional`) it is taken at each position, which leaves out how errors
    at two positions act together, but needs far fewer samples [our construction]. A layer that runs more than once has
    one error of all its runs, and so has a stack of experts at each token that reaches several of them. Experts that
    are layers of their own have what they change at the tokens that reach them, as a mean over all tokens. What a
    BatchNorm behind a layer removes, a channel's shift and scale, is not counted [our construction].

    Args:
        layers: {name: quantized layer}; all quantizers off.
        model: The network that holds them, in eval mode.
        batches: What to run it on; labels are not used. Reading ends before a batch that would go beyond `SAMPLES`
            samples in all, and after one that reached `POSITIONS` items where items are positions.
        task: What the output means.
        normed: Names of layers that a BatchNorm reads.
        seed: Of the drawn labels.

    Returns:
        Values that do not fall with the width, and standard errors over samples. One forward and backward a batch, and
        one run of each layer an operand and width. Of several processes: the mean of all.

    Raises:
        InvalidArgument: No item of the batches counts.
    """
    sides = {
        "weight": {n: m.weight_quantizer for n, m in layers.items()},
        "activation": {n: m.input_quantizer for n, m in layers.items() if m.input_quantizer is not None},
    }
    sums = {side: {n: {b: [0.0, 0.0] for b in q.widths} for n, q in found.items()} for side, found in sides.items()}
    held: dict[str, dict[tuple[str, int], Tensor]] = {}
    calls: dict[str, int] = {}
    axes: dict[str, int] = {}
    unsure: set[str] = set()
    batch_size, forward = 1, True

    def settle(name: str) -> None:
        for (side, bits), products in held.pop(name, {}).items():
            found = products.square().sum(1)
            both = torch.stack([found.sum(), found.square().sum()]).tolist()
            row = sums[side][name][bits]
            row[0], row[1] = row[0] + both[0], row[1] + both[1]

    @torch.no_grad()
    def add(name: str, x: Tensor, more: tuple[Any, ...], grad: Tensor) -> None:
        if unsure:  # the gradient of the first sample alone
            if name in unsure:
                axes[name] = int(not grad[:, 1:].any() and bool(grad[1:].any()))
            return
        module, found = layers[name], {}
        for side, quantizers in sides.items():
            if name not in quantizers:
                continue
            direct = side == "weight" and name not in normed and isinstance(module, (QuantLinear, QuantConv1D))
            for bits, error in (
                _matrix_errors(module, x) if direct else _errors(module, quantizers[name], (x, *more), name in normed)
            ):
                product = (grad.float() * error).movedim(axes.get(name, 0), 0)
                if more:  # an expert's rows are some of the tokens
                    _, tokens, count = more
                    product = product.new_zeros(count, 1).index_add_(0, tokens, product.sum(1, keepdim=True))
                found[side, bits] = _products(product, module, batch_size, task.positional)
        before = held.get(name)
        # the errors of a layer that runs more than once act together
        if before is not None and all(found[key].shape == products.shape for key, products in before.items()):
            found = {key: before[key] + products for key, products in found.items()}
        elif before is not None:
            settle(name)
        held[name] = found
        calls[name] -= 1
        if not calls[name]:
            settle(name)

    handles = []
    for name, module in layers.items():

        def keep(
            _m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, name: str = name
        ) -> Tensor | None:
            if forward:  # not a block's second run, on the way back
                calls[name] = calls.get(name, 0) + 1
                if not task.positional and name not in axes and _may_be_second(output, batch_size):
                    unsure.add(name)
            if not torch.is_grad_enabled():  # a block's first run
                return None
            x = first_operand(args, kwargs).detach()
            more = args[1:] if isinstance(_m, Stack) else ()
            # nothing that learns stands before it; a copy, for what follows may change it in place
            own = output if output.requires_grad else output.detach().requires_grad_().clone()
            own.register_hook(lambda grad: add(name, x, more, grad))
            return own

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    items, samples, unit = 0.0, 0.0, ""
    rank, processes = world()
    blocks = blocks_of(model, {name: module.weight.numel() for name, module in layers.items()})
    try:
        with torch.enable_grad(), frozen(model), cache_off(model), checkpointed(blocks.values()):
            for i, batch in enumerate(batches):
                batch_size = int(task.samples(batch))
                if items and (samples + batch_size > SAMPLES or (task.positional and items >= POSITIONS)):
                    break
                calls.clear()
                forward = True
                with fixed_draws(next(model.parameters()).device, seed + i):
                    output = task.forward(model, batch)
                forward = False
                generator = torch.Generator().manual_seed(seed + i * processes + rank)
                unit = unit or task.unit(output)
                values, kept = task.probe(output, generator, task.mask(batch))
                values = torch.where(kept, values, torch.zeros_like(values))
                if unsure:
                    values[0].sum().backward(retain_graph=True)
                    unsure.clear()
                values.sum().backward()
                for name in list(held):  # a call whose output went nowhere
                    settle(name)
                items, samples = items + float(kept.sum()), samples + batch_size
    finally:
        for handle in handles:
            handle.remove()
    whole = counted(total(items)[0]) / processes
    means, errors = {}, {}
    for side, found in sums.items():
        # the variance of a sum over samples, from the sum of squares
        means[side] = mean_rows({n: {b: s / whole for b, (s, _) in row.items()} for n, row in found.items()})
        squares = mean_rows(
            {n: {b: _variance(pair[0], pair[1], samples) for b, pair in row.items()} for n, row in found.items()}
        )
        errors[side] = {n: {b: math.sqrt(v / processes) / whole for b, v in row.items()} for n, row in squares.items()}
    _fill_unreached(model, layers, means["weight"], errors["weight"])
    weight, activation = ({n: monotone(row) for n, row in means[side].items()} for side in sides)
    return Sensitivity(weight, activation, errors["weight"], errors["activation"], unit)


def _fill_unreached(model: nn.Module, layers: Mapping[str, Any], means: Rows, errors: Rows) -> None:
    """Give experts that no token reached the mean of their stack's others, in both: what they cost is not known, and
    not nothing."""
    stacks: dict[str, list[str]] = {}
    for name, module in layers.items():
        if isinstance(module, Stack) and (part := stack_and_expert(model, name)) is not None:
            stacks.setdefault(part[0], []).append(name)
    for names in stacks.values():
        reached = [name for name in names if any(means[name].values())]
        for rows in (means, errors) if reached else ():
            for name in set(names).difference(reached):
                known = {bits: [rows[other][bits] for other in reached if bits in rows[other]] for bits in rows[name]}
                rows[name] = {bits: sum(found) / max(len(found), 1) for bits, found in known.items()}


def _errors(module: Any, quantizer: Any, args: tuple[Any, ...], normed: bool) -> Iterator[tuple[Any, Tensor]]:
    """(width, what it changes in a layer's output, float32) for all widths of one of its quantizers."""
    # the class's forward: calling the module would run the hooks again
    y = type(module).forward(module, *args).float()
    for bits in quantizer.widths:
        with at(quantizer, bits):
            moved = type(module).forward(module, *args).float()
        yield bits, (like(moved, y) if normed else moved) - y


def _matrix_errors(module: Any, x: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """As `_errors` for the weight of a matrix product, in one product a width: x·ΔW."""
    weight, x = module.weight.float(), x.float()
    for bits in module.weight_quantizer.widths:
        with at(module.weight_quantizer, bits):
            moved = module.weight_quantizer(module.weight).float() - weight
        yield bits, x @ (moved.t() if isinstance(module, QuantLinear) else moved)


def _variance(first: float, second: float, samples: float) -> float:
    """Variance of a sum over samples of which the sum and the sum of squares are known; infinite for a single one."""
    return max(second - first * first / samples, 0.0) * samples / (samples - 1) if samples > 1 else math.inf


def _may_be_second(output: Tensor, samples: int) -> bool:
    """Whether the samples of an output may lie along its second axis ([positions, samples, …]); parts of samples may
    have the same form ([windows of all samples, positions, …])."""
    return output.dim() > 2 and output.shape[1] == samples > 1


def _products(product: Tensor, module: nn.Module, samples: int, positional: bool) -> Tensor:
    """g·ΔY summed over each sample, [samples, 1], or at every position, [samples, positions]; with one row for every
    row of the output where its first axis is not a whole number of rows a sample."""
    if positional:
        product = product.sum(1 if module.weight.dim() > 2 and product.dim() > 2 else -1)
    rows = product.reshape(samples, -1) if len(product) % max(samples, 1) == 0 else product.flatten(1)
    return rows if positional else rows.sum(1, keepdim=True)
