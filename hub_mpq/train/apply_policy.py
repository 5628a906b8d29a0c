"""Quantize a model at a policy: quantizers in, scales of least squared error."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import nn

from ..core import LayerGraph, Policy
from ..errors import InvalidArgument
from ..nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs
from ..nn.quantize import check_finite, quantize_to_policy
from ..tasks import TaskLike, task_of, to_device


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

    Raises:
        PolicyMismatch: The policy is for another graph.
        InvalidArgument: There is no batch, no layer that can be quantized, or a layer's weight that holds NaN or
            infinite values.
    """
    graph.check_layers(searched=False)
    policy.check(graph)
    check_finite(model, graph.names)
    device = next(model.parameters()).device
    taken = [to_device(batch, device) for batch in islice(batches, limit)]
    if not taken:
        raise InvalidArgument("the calibration data are empty")
    known = task_of(task, model, example=example)
    quantize_to_policy(model, graph, policy, per_channel=per_channel)
    calibrate_weights(model, mse=True)
    calibrate_inputs(model, sample_inputs(model, taken, known.forward), mse=True)
