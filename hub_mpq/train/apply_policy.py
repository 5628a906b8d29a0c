"""Quantize a model at a policy: insert quantizers, round weights, calibrate scales."""

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
    """Quantize a float model at a policy, in place, and calibrate its scales on a few batches.

    Args:
        model: The float model.
        graph: Its layers.
        policy: Their bit-widths.
        batches: Calibration data for the scales of activations.
        limit: Maximum number of batches used for them.
        per_channel: Whether weights have one scale per output channel, else one per tensor.
        task: Task of the model, which tells the inputs in a batch; None to infer it from the model.
        example: One input as the network takes it, which tells how many inputs a batch has.
        rounding: "gptq" or "nearest" to round the weights as `round_weights` does, on up to 16 batches. None to round
            to nearest, with scales computed from the weights alone.
        rounded: Weights that have already been rounded, instead of `rounding`.

    Raises:
        PolicyMismatch: The policy is for other layers.
        InvalidArgument: There is no batch, no layer that can be quantized, or the weight of a layer has NaN or infinite
            values.
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
                "rounding requires per-channel weight scales; omit it with one scale per tensor, where weights are "
                "rounded to nearest"
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
