"""Fold BatchNorm into the preceding convolution of an ONNX graph: into the scale of its weight and its bias."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from .onnx_calls import scope

_LOWEST = -128
"""The only INT8 value that cannot be negated."""


def fold_norms(graph: Any, kept: Collection[str] = ()) -> dict[str, Any]:
    """Fold each BatchNormalization into its convolution, in place.

    The convolution must have an integer weight that it does not share, and its norm must be its only reader. If the
    factor of a channel is negative, its integers are negated, so that scales stay positive. A convolution with an
    integer of -128 in such a channel keeps its norm.

    Args:
        graph: A GraphProto with torch.onnx's metadata.
        kept: Convolutions that keep their norm.

    Returns:
        {output of a convolution: the node of the norm that was folded into it}.
    """
    from onnx import helper, numpy_helper

    made = {out: node for node in graph.node for out in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, int] = {output.name: 1 for output in graph.output}
    for name in (name for node in graph.node for name in node.input):
        readers[name] = readers.get(name, 0) + 1

    folded: dict[str, Any] = {}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = made.get(norm.input[0])
        weight = made.get(conv.input[1]) if conv is not None and conv.op_type == "Conv" else None
        if weight is None or weight.op_type != "DequantizeLinear" or scope(conv) in kept:
            continue
        constants = [*norm.input[1:], *conv.input[2:], *weight.input]
        if readers[norm.input[0]] > 1 or readers[conv.input[1]] > 1 or not all(name in values for name in constants):
            continue
        array = {name: numpy_helper.to_array(values[name]) for name in constants}
        scale, shift, mean, variance = (array[name].astype(np.float64) for name in norm.input[1:])
        factor = scale / np.sqrt(variance + next(a.f for a in norm.attribute if a.name == "epsilon"))
        bias = shift - mean * factor + (array[conv.input[2]] * factor if len(conv.input) > 2 else 0)
        integers, negative = array[weight.input[0]], factor < 0
        if (integers[negative] == _LOWEST).any():
            continue
        out = norm.output[0]
        new = {
            f"{out}.integers": np.where(negative[:, None, None, None], -integers, integers),
            f"{out}.scale": array[weight.input[1]] * np.abs(factor).astype(np.float32),
            f"{out}.bias": bias.astype(np.float32),
        }
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in new.items())
        weight.input[:] = list(new)[:2]
        del weight.attribute[:]
        weight.attribute.append(helper.make_attribute("axis", 0))
        conv.input[2:] = list(new)[2:]
        conv.output[0] = out
        folded[out] = norm
    _remove(graph, folded)
    return folded


def _remove(graph: Any, folded: dict[str, Any]) -> None:
    """Remove the folded norms, and unused initializers."""
    kept = [node for node in graph.node if node.op_type != "BatchNormalization" or node.output[0] not in folded]
    kept = [type(node).FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in graph.node for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in tensors:
        graph.initializer.remove(tensor)
    del graph.value_info[:]
