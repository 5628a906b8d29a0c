"""Estimate, by the Fisher information, how far the output moves when one operand of one layer is quantized."""

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
"""Maximum number of samples and positions that are read.

They are large enough that the number of samples, which bounds the rank of the estimated Fisher information, is not the
limiting factor.
"""


class Sensitivity(NamedTuple):
    """Divergence of the output by layer and bit-width.

    Attributes:
        weight: `{layer: {bits: divergence}}` of weights.
        activation: The same of inputs.
        weight_error: Standard errors of `weight`.
        activation_error: Standard errors of `activation`.
        unit: Unit of the divergence.
    """

    weight: Rows
    activation: Rows
    weight_error: Rows
    activation_error: Rows
    unit: str

    def relative_error(self) -> dict[str, float]:
        """Return `{layer: relative standard error of the sum of its operands, at the narrowest bit-widths}`.

        Layers are omitted where it is unknown, as with a single sample, or zero.
        """
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
    """Turn a quantizer on at a bit-width, then off."""
    quantizer.set_width(bits)
    try:
        yield
    finally:
        quantizer.set_width(None)


def like(moved: Tensor, y: Tensor) -> Tensor:
    """Adjust the mean and deviation of each channel (dimension 1) of `moved` to those of `y`.

    A BatchNorm that reads it will do the same after re-estimation. With one or two values per channel nothing is
    changed, because no error would be left.
    """
    if y.numel() <= 2 * y.shape[1]:
        return moved
    dims = [d for d in range(y.dim()) if d != 1]
    spread = moved.std(dims, correction=0, keepdim=True)
    deviation = torch.where(spread > 0, y.std(dims, correction=0, keepdim=True) / spread, 0.0)
    return (moved - moved.mean(dims, keepdim=True)) * deviation + y.mean(dims, keepdim=True)


def monotone(row: Mapping[Any, float]) -> dict[Any, float]:
    """Make `{bits or LayerBits: value}` non-increasing in the bit-width within the same groups, and at least LEAST."""
    out = {bits: max(value, LEAST) for bits, value in sorted(row.items())}
    groups: dict[Any, list[Any]] = {}
    for bits in sorted(out, reverse=True):
        groups.setdefault(None if isinstance(bits, int) else (bits.group_size, bits.symmetric), []).append(bits)
    for wider, bits in (pair for widths in groups.values() for pair in pairwise(widths)):
        out[bits] = max(out[bits], out[wider])
    return out


def counted(items: float) -> float:
    """Return the number of items to average over; raise InvalidArgument if there are none."""
    if not items:
        raise InvalidArgument("the masks of the batches must keep at least one item")
    return items


def sensitivity(
    layers: Mapping[str, Any],
    model: nn.Module,
    batches: Sequence[Any],
    task: Task,
    normed: Collection[str] = (),
    seed: int = 0,
) -> Sensitivity:
    """Estimate the divergence from the float model when one operand alone is quantized, as a mean over items.

    To second order, the divergence is half the square of an error in the metric of the Fisher information. For labels
    drawn from the model's own output, this is the mean of ½(g·ΔY)², where Y is the output of the layer, ΔY its change
    when the weight or the input is quantized, and g the gradient of −log p(label). `Task.probe` provides such a random
    value for every item, also for tasks without a distribution, whose divergence is a squared error. All layers and
    operands thus have one unit, the divergence of the task, and their sum estimates that of a policy.

    The errors of a weight add up over the positions of an image, so g·ΔY is summed over each sample. Where the items
    are positions (tokens or pixels, see `Task.positional`), it is taken at each position, which neglects the
    interaction of errors at different positions, but needs far fewer samples; this is our construction. A layer that
    runs several times has one error for all its runs, as has a stack of experts for each token that reaches several of
    them. Experts that are separate layers have the change at the tokens that reach them, averaged over all tokens.
    Shifts and scales of channels that a BatchNorm after the layer removes are not counted, which is our construction,
    too.

    This takes one forward and backward pass per batch, and one run of each layer per operand and bit-width.

    Args:
        layers: `{name: quantized layer}`; all quantizers are off.
        model: The network with these layers, in eval mode.
        batches: Batches; labels are ignored. Reading ends before a batch that would exceed `SAMPLES` samples in total
            and, if items are positions, after the batch that reaches `POSITIONS` items.
        task: Task of the model.
        normed: Names of the layers that a BatchNorm reads.
        seed: Seed of the drawn labels.

    Returns:
        Values that do not increase with the bit-width, and their standard errors over samples; the mean over processes.

    Raises:
        InvalidArgument: The masks of the batches exclude all items.
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
        if unsure:  # this gradient is that of the first sample alone
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
                if more:  # the rows of an expert are some of the tokens
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
            if forward:  # not the second run of a block, in the backward pass
                calls[name] = calls.get(name, 0) + 1
                if not task.positional and name not in axes and _may_be_second(output, batch_size):
                    unsure.add(name)
            if not torch.is_grad_enabled():  # the first run of a block
                return None
            x = first_operand(args, kwargs).detach()
            more = args[1:] if isinstance(_m, Stack) else ()
            # without a gradient, nothing before it is trained; a copy, since the next module may change it in place
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
                for name in list(held):  # a call whose output was not used
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
    """Give experts without tokens the mean of the other experts of their stack, since their cost is unknown, not 0."""
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
    """Yield (bits, change of the output of a layer, float32) for all bit-widths of one of its quantizers."""
    # the forward of the class, since calling the module would run the hooks again
    y = type(module).forward(module, *args).float()
    for bits in quantizer.widths:
        with at(quantizer, bits):
            moved = type(module).forward(module, *args).float()
        yield bits, (like(moved, y) if normed else moved) - y


def _matrix_errors(module: Any, x: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Yield the same as `_errors` for the weight of a matrix product, by one product x·ΔW per bit-width."""
    weight, x = module.weight.float(), x.float()
    for bits in module.weight_quantizer.widths:
        with at(module.weight_quantizer, bits):
            moved = module.weight_quantizer(module.weight).float() - weight
        yield bits, x @ (moved.t() if isinstance(module, QuantLinear) else moved)


def _variance(first: float, second: float, samples: float) -> float:
    """Compute the variance of a sum over samples from the sum and the sum of squares; infinite for one sample."""
    return max(second - first * first / samples, 0.0) * samples / (samples - 1) if samples > 1 else math.inf


def _may_be_second(output: Tensor, samples: int) -> bool:
    """Whether the second axis of an output may be that of the samples, as in `[positions, samples, …]`.

    Parts of samples may have the same shape, as in `[windows of all samples, positions, …]`.
    """
    return output.dim() > 2 and output.shape[1] == samples > 1


def _products(product: Tensor, module: nn.Module, samples: int, positional: bool) -> Tensor:
    """Sum g·ΔY over each sample, `[samples, 1]`, or at every position, `[samples, positions]`.

    If the first axis of the output is not a multiple of the samples, there is one row for each of its rows.
    """
    if positional:
        product = product.sum(1 if module.weight.dim() > 2 and product.dim() > 2 else -1)
    rows = product.reshape(samples, -1) if len(product) % max(samples, 1) == 0 else product.flatten(1)
    return rows if positional else rows.sum(1, keepdim=True)
