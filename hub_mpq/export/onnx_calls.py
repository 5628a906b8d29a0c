"""Find the quantized layers of a model in its ONNX graph."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"
_PRODUCTS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Requantized:
    """The codes that a layer's output is converted to, if nothing else reads it.

    Args:
        codes: Name of the codes, UINT8.
        values: Name of the dequantized codes; "" if the codes are clipped first.
        low: Lower bound that the output is clipped to before.
        high: Upper bound that the output is clipped to before.
        scale: Scale of the codes.
        zero_point: Zero point of the codes.
    """

    codes: str
    values: str
    low: float
    high: float
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Call:
    """Names of tensors of one call of a layer with integer inputs and weights.

    Args:
        codes: Codes of the input, UINT8.
        values: Dequantized codes of the input.
        weight: Integers of the weight.
        bias_error: Mean distance of a convolution's biases from multiples of the steps of its sums.
        product: Output of the convolution or matrix product.
        output: Output with the bias.
        norm: Name of the BatchNorm that is folded in, or "".
        requantized: The codes that the output is converted to, if nothing else reads it.
    """

    codes: str
    values: str
    weight: str
    bias_error: float
    product: str
    output: str
    norm: str
    requantized: Requantized | None


def scope(node: Any) -> str:
    """Name of the innermost module that a node was made for; "" for none."""
    told = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
    modules: list[str] = ast.literal_eval(told)[:-1]
    return modules[-1] if modules else ""


class _Index:
    """The producer and the readers of each tensor of a graph."""

    def __init__(self, graph: Any) -> None:
        self.made = {out: node for node in graph.node for out in node.output}
        self.values = {tensor.name: tensor for tensor in graph.initializer}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        for output in graph.output:
            self.readers.setdefault(output.name, []).append(None)

    def array(self, name: str) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.values[name])

    def number(self, name: str) -> float:
        return float(self.array(name))

    def bias_error(self, conv: Any, x: Any, weight: Any) -> float:
        step = self.number(x.input[1]) * self.array(weight.input[1]).astype("float64")
        bias, whole = self.array(conv.input[2]), step > 0
        error = bias - (bias / (step + ~whole)).round() * step  # the whole bias for a channel without a scale
        return float(abs(error).mean())

    def dequantized(self, name: str) -> Any:
        """The DequantizeLinear that a tensor, or its base if it is a view, comes from; None if there is none."""
        node = self.made.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape"):
            node = self.made.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def requantized(self, name: str) -> Requantized | None:
        """The codes that a tensor is converted to, if nothing else reads it."""
        low, high = -float("inf"), float("inf")
        while True:
            readers = self.readers.get(name, [])
            node = readers[0] if len(readers) == 1 else None
            if node is None or node.op_type not in ("Relu", "Clip", "QuantizeLinear"):
                return None
            constants = [x for x in node.input[1:] if x]
            if not all(x in self.values for x in constants):
                return None
            if node.op_type == "QuantizeLinear":
                break
            ends = [0.0] if node.op_type == "Relu" else [self.number(x) if x else None for x in node.input[1:]]
            for bound, largest in zip(ends, (False, True), strict=False):
                if bound is not None:
                    low, high = (min(low, bound), min(high, bound)) if largest else (max(low, bound), max(high, bound))
            name = node.output[0]
        codes, (scale, zero_point) = node.output[0], map(self.number, constants)
        after = [reader for reader in self.readers.get(codes, []) if reader is not None]
        values = next((reader.output[0] for reader in after if reader.op_type == "DequantizeLinear"), "")
        return Requantized(codes, values, low, high, scale, int(zero_point))


MOST_MOVED = 5e-4
"""Maximum share of codes that rounded biases may change."""


def rounded(calls: Mapping[str, list[Call]]) -> list[str]:
    """Convolutions whose biases change too many codes if an engine rounds them to steps of integer sums.

    A bias that is off by a fraction of the output's step changes that fraction of the codes.
    """

    def moves(call: Call) -> bool:
        return call.requantized is not None and call.bias_error > MOST_MOVED * call.requantized.scale

    return [name for name, each in calls.items() if any(map(moves, each))]


def find_calls(graph: Any, folded: Mapping[str, str]) -> dict[str, list[Call]]:
    """Find the calls of layers with codes for input and weight; nodes that make codes are named like their output.

    Args:
        graph: A GraphProto with torch.onnx's metadata.
        folded: {output of a convolution: name of the BatchNorm that was folded into it}.

    Returns:
        {layer: its calls}.
    """
    index = _Index(graph)
    scopes = {node.output[0]: scope(node) for node in graph.node}
    found: dict[str, list[Call]] = {}
    for node in graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        x, weight = (index.dequantized(name) for name in node.input[:2])
        if x is None or weight is None or x.input[0] not in index.made:
            continue
        layer, out = scopes[node.output[0]], node.output[0]
        for user in graph.node:  # the bias of a product, added by a node of the same layer
            if layer and out in user.input and scopes[user.output[0]] == layer:
                out = user.output[0]
        codes, values = x.input[0], x.output[0]
        off = index.bias_error(node, x, weight) if node.op_type == "Conv" and len(node.input) > 2 else 0.0
        norm, after = folded.get(out, ""), index.requantized(out)
        call = Call(codes, values, weight.input[0], off, node.output[0], out, norm, after)
        found.setdefault(layer, []).append(call)
        index.made[codes].name = codes
    return found
