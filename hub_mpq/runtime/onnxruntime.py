"""ONNX Runtime: the whole network on a CPU; linear layers in integers, convolutions where that is exact."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..export.onnx import OnnxGraph
from ..export.onnx_calls import Call, rounded
from .engine import EngineRuntime, Session
from .integer_layer import INT32
from .machine import has_vnni

_DISABLED = ["MatMulAddFusion", "SkipLayerNormFusion", "WeightBiasQuantization"]
"""The first prevents the fusion of a layer's product with its quantized input; the second is slower than its parts; the
third rounds float weights and biases, even to a very coarse grid."""
_PRODUCTS = ("QLinearConv", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm")
_SILENT = 4


def _session(content: bytes, optimized: Path | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _SILENT
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED)


class OnnxRuntime(EngineRuntime):
    """ONNX Runtime's CPU execution provider, from the graph in memory."""

    name = package = "onnxruntime"
    extra = "onnx"
    clip_codes: ClassVar[bool] = True

    def saturates(self) -> bool:
        """Whether the CPU lacks VNNI; the kernels always use the instructions that the CPU has."""
        return not has_vnni()

    def why_float(self, graph: OnnxGraph, name: str) -> str:
        if name in rounded(graph.calls):
            return "its bias would be rounded too coarsely"
        return super().why_float(graph, name)

    def session(self, graph: OnnxGraph, outputs: tuple[str, ...] = ()) -> tuple[Session, frozenset[str]]:
        with tempfile.TemporaryDirectory() as folder:  # ONNX Runtime reveals its optimized graph only in a file
            path = Path(folder) / "optimized.onnx"
            rounded_biases = _with_integer_biases(graph)
            session = _session(rounded_biases.serialized(outputs), path)
            integer = _in_integers(graph, path)
            if others := [name for name in graph.calls if name not in integer]:
                session = _session(_with_float_weights(rounded_biases, others).serialized(outputs), path)
                integer = _in_integers(graph, path)

        def run(feeds: Mapping[str, Tensor]) -> list[Tensor]:
            given = {name: x.detach().contiguous().numpy() for name, x in feeds.items()}
            return [torch.from_numpy(x) for x in session.run(None, given)]

        return run, integer


def _with_integer_biases(graph: OnnxGraph) -> OnnxGraph:
    """Round the biases of convolutions to the step of their sums, where this changes few codes.

    ONNX Runtime computes only such convolutions in integers.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    proto = type(graph.proto)()
    proto.CopyFrom(graph.proto)
    made = {out: node for node in proto.graph.node for out in node.output}
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    coarse = rounded(graph.calls)
    new = []
    for call in (call for name, calls in graph.calls.items() if name not in coarse for call in calls):
        conv = made[call.product]
        if conv.op_type != "Conv" or len(conv.input) < 3 or call.requantized is None:
            continue
        names = (made[call.values].input[1], made[conv.input[1]].input[1], conv.input[2])
        of_input, of_weight, bias = (numpy_helper.to_array(values[name]).astype(np.float64) for name in names)
        step = np.broadcast_to(of_input * of_weight, bias.shape).astype(np.float32)
        steps = np.round(np.divide(bias, step, out=np.zeros_like(bias), where=step > 0))
        if abs(steps).max() > INT32:
            continue
        parts = [f"{call.product}.{part}" for part in ("bias_steps", "bias_step", "whole_bias")]
        for name, value in zip(parts, (steps.astype(np.int32), step), strict=False):
            proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        new.append(helper.make_node("DequantizeLinear", parts[:2], parts[2:], axis=0))
        conv.input[2] = parts[2]
    nodes = [*new, *(type(node).FromString(node.SerializeToString()) for node in proto.graph.node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return replace(graph, proto=proto)


def _with_float_weights(graph: OnnxGraph, names: Collection[str]) -> OnnxGraph:
    """Give convolutions that are not computed in integers float weights.

    Otherwise ONNX Runtime multiplies the weights by their scales at every run, and uses a slower memory layout.
    """
    from onnx import numpy_helper

    proto = type(graph.proto)()
    proto.CopyFrom(graph.proto)
    made = {out: node for node in proto.graph.node for out in node.output}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for call in (call for name in names for call in graph.calls[name]):
        conv = made[call.product]
        if conv.op_type != "Conv" or conv.input[1] not in made:
            continue
        integers, scale = (values[name] for name in made[conv.input[1]].input[:2])
        weight = (integers * scale.reshape(-1, 1, 1, 1)).astype(scale.dtype)
        conv.input[1] = f"{call.product}.float_weight"
        proto.graph.initializer.append(numpy_helper.from_array(weight, conv.input[1]))
    return replace(graph, proto=proto)


def _in_integers(graph: OnnxGraph, path: Path) -> frozenset[str]:
    """The layers whose products all run in integers, according to ONNX Runtime's optimized graph."""
    import onnx

    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type in _PRODUCTS]
    done = {name for node in nodes for name in (*node.input, *node.output)}

    def runs(call: Call) -> bool:
        return bool({call.weight, call.product, call.output} & done)

    return frozenset(name for name, calls in graph.calls.items() if all(map(runs, calls)))
