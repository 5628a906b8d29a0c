"""OpenVINO: the whole network on a CPU, in int8 where inputs and weights are int8."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HubMPQError, InvalidArgument
from ..export.onnx import OnnxGraph
from ..pack.atomic_folder import atomic_folder
from .engine import EngineRuntime, Session, network_of
from .machine import has_vnni

IR = "model.xml"
_INTEGERS = ("u8", "i8")
_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
_VIEWS = ("Reorder", "Reshape", "Transpose", "Split")
_ALONE = threading.Lock()


def _core() -> Any:
    """OpenVINO's core: one for the whole process, which is never freed.

    The first model that a core compiles sets the stack for signal handlers of this thread, and freeing the core unmaps
    it. If cores are freed in another order than they were made, or by another thread, the thread keeps an unmapped
    stack, and the next signal, such as Ctrl-C, kills the process (OpenVINO 2026.4).
    """
    with _ALONE:
        return _the_core()


@lru_cache
def _the_core() -> Any:
    import openvino as ov

    return ov.Core()


@lru_cache
def saturates() -> bool:
    """Whether OpenVINO sums two products in 16 bits on this CPU; tested with twice 255 · 127."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([1, 64], ov.Type.f32)
    zero, top = (ops.constant(np.float32(value)) for value in (0, 255))
    codes = ops.fake_quantize(x, zero, top, zero, top, 256)
    weight = ops.convert(ops.constant(np.full((16, 64), 127, np.int8)), ov.Type.f32)
    product = ops.matmul(codes, ops.multiply(weight, ops.constant(np.ones((16, 1), np.float32))), False, True)
    compiled = _core().compile_model(ov.Model([product], [x]), "CPU", _settings())
    out = compiled([np.full((1, 64), 255, np.float32)])[0]
    return float(out[0, 0]) != 64 * 255 * 127


def _settings() -> dict[str, Any]:
    return {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }


def _model(graph: OnnxGraph, outputs: tuple[str, ...] = ()) -> Any:
    """Convert the graph to OpenVINO's in memory; raises HubMPQError for an unsupported operator."""
    try:
        return _core().read_model(io.BytesIO(graph.serialized(outputs)))
    except RuntimeError as error:
        said = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "not supported" in line]
        why = said[0] if said else str(error).strip().partition("\n")[0]
        raise HubMPQError(f"OpenVINO cannot read the model [{why}]; use another runtime") from error


class OpenVINO(EngineRuntime):
    """OpenVINO's CPU plugin, from the ONNX graph in memory; it fuses norms and activations."""

    name = package = "openvino"
    extra = "openvino"

    def saturates(self) -> bool:
        return saturates() if self.available() is None else not has_vnni()

    def session(self, graph: OnnxGraph, outputs: tuple[str, ...] = ()) -> tuple[Session, frozenset[str]]:
        compiled = _core().compile_model(_model(graph, outputs), "CPU", _settings())
        request = compiled.create_infer_request()
        count, alone = len(compiled.outputs), threading.Lock()  # a request serves only one caller at a time
        read = {name for port in compiled.inputs for name in port.names}

        def run(feeds: Mapping[str, Tensor]) -> list[Tensor]:
            given = {name: x.detach().contiguous().numpy() for name, x in feeds.items() if name in read}
            with alone:
                found = request.infer(given, share_inputs=True)
                return [torch.from_numpy(found[i]) for i in range(count)]

        return run, _in_integers(graph, compiled.get_runtime_model())


def _in_integers(graph: OnnxGraph, runtime_model: Any) -> frozenset[str]:
    """The layers whose products all run in int8, according to the engine's own graph.

    The engine keeps the names of the nodes that make codes, but not those of all products. So layers with integer
    weights that read the same codes count only if all of them run in int8.
    """
    readers: dict[str, list[bool]] = {}
    for node in runtime_model.get_ops():
        told = _told(node)
        if told["layerType"] in _PRODUCTS:
            for name in _names_before(node):
                readers.setdefault(name, []).append(told["runtimePrecision"] in _INTEGERS)
    calls: dict[str, int] = {}
    for call in (call for each in graph.calls.values() for call in each):
        calls[call.codes] = calls.get(call.codes, 0) + 1
    done = {code for code, count in calls.items() if sum(readers.get(code, [])) == count}
    return frozenset(name for name, each in graph.calls.items() if all(call.codes in done for call in each))


def _names_before(node: Any) -> list[str]:
    """Names of the original nodes of the nearest node before a product, skipping copies and views."""
    while node.get_input_size():
        node = node.input_value(0).get_node()
        told = _told(node)
        if told["layerType"] not in _VIEWS:
            return told.get("originalLayersNames", "").split(",")
    return []


def _told(node: Any) -> dict[str, str]:
    """The runtime information of one node of the engine's graph."""
    values = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
    return {key: str(value) for key, value in values.items()}


def save_ir(module: nn.Module, folder: str | Path) -> Path:
    """Save the network in OpenVINO's format, model.xml and model.bin, for programs without torch.

    Args:
        module: A module made by `to_runtime(model, "openvino")`; the model must still exist.
        folder: Folder to write to.

    Returns:
        The path of model.xml.

    Raises:
        InvalidArgument: The module is another one.
    """
    import openvino as ov

    if getattr(getattr(module, "runtime_layers", None), "runtime", "") != OpenVINO.name:
        raise InvalidArgument(f"expected a module made by to_runtime(model, 'openvino'), got {type(module).__name__}")
    with atomic_folder(folder) as work:
        ov.save_model(_model(network_of(module).take_graph()), work / IR, compress_to_fp16=False)
    return Path(folder) / IR
