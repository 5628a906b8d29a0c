"""Quantize a model at a policy: quantizers in, weights rounded, scales calibrated."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import nn

from ..core import FLOAT_BITS, LayerGraph, Policy
from ..errors import InvalidArgument
from ..nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs
from ..nn.packing import take_weight
from ..nn.quantize import check_finite, quantize_to_policy, quantized_layers
from ..nn.rounded_weights import RoundedWeights
from ..tasks import TaskLike, task_of, to_device
from .round_weights import BATCHES, round_weights


def apply_policy(
    model: nn.Module,
    graph: LayerGraph,
    policy: Policy,
    batches: Iterable[Any],
    *,
    limit: int = 4,
    per_channel: bool = True,
    task: TaskLike = None,
    example: Any = None,
    rounding: str | None = None,
    rounded: RoundedWeights | None = None,
) -> None:
    """Give a float model the quantizers of a policy, in place, calibrated on a few batches.

    Args:
        model: The float model.
        graph: Its layers.
        policy: Their widths.
        batches: What the scales of activations are calibrated on.
        limit: How many batches are looked at.
        per_channel: One weight scale per output channel, else one per tensor.
        task: What the model is for, which says what of a batch is an input; None to find out from the model.
        example: One input as the network takes it, which says how many inputs a batch has.
        rounding: Round the weights as `round_weights` does, on up to 16 batches: "gptq" or "nearest". None: to the
            nearest points, at scales found from the weights alone.
        rounded: Weights that were rounded before, in place of `rounding`.

    Raises:
        PolicyMismatch: The policy is for another graph.
        InvalidArgument: There is no batch, no layer that can be quantized, or a layer's weight that holds NaN or
            infinite values.
    """
    graph.check_layers(searched=False)
    policy.check(graph)
    check_finite(model, graph.names)
    device = next(model.parameters()).device
    first = list(islice(batches, limit if rounding is None or rounded is not None else max(limit, BATCHES)))
    if not first:
        raise InvalidArgument("the calibration data are empty")
    if rounding is not None and rounded is None:
        if not per_channel:
            raise InvalidArgument(
                "weights with one scale per tensor are rounded to the nearest points: leave rounding out"
            )
        choices = {name: (bits.of_weight,) for name, bits in policy.bits.items() if bits.weight != FLOAT_BITS}
        choices = {name: found for name, found in choices.items() if graph[name].weight_owner is None}
        rounded = round_weights(model, graph, choices, first, rounding=rounding, task=task, example=example)
    taken = [to_device(batch, device) for batch in first[:limit]]
    known = task_of(task, model, example=example)
    quantize_to_policy(model, graph, policy, per_channel=per_channel)
    calibrate_inputs(model, sample_inputs(model, taken, known.forward), mse=True)
    if rounded is None:
        calibrate_weights(model, mse=True)
        return
    for name, module in quantized_layers(model):
        if graph[name].weight_owner is None:
            take_weight(model, module, rounded.packed(name, policy.bits[name]), values=not rounded.nearest)
