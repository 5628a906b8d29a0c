"""ONNX Runtime: the whole network on a CPU; linear layers in integers, convolutions where that is exact."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..export.onnx import OnnxGraph
from ..export.onnx_calls import Call, rounded
from .engine import EngineRuntime, Session
from .machine import has_vnni

_DISABLED = ["MatMulAddFusion", "SkipLayerNormFusion"]
"""The first hides a layer's product from the fusion with its quantized input; the second is slower than its parts."""
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
    """ONNX Runtime's CPU provider, from the graph in memory."""

    name = package = "onnxruntime"
    clip_codes: ClassVar[bool] = True

    def available(self) -> str | None:
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return f"it needs pip install 'hub-mpq[onnx]' ({error})"
        return super().available()

    def saturates(self) -> bool:
        """By the flags of the CPU: its kernels cannot be told to do without instructions that are there."""
        return not has_vnni()

    def rounds(self, graph: OnnxGraph) -> dict[str, str]:
        """Convolutions whose biases, which ONNX Runtime rounds to steps of their sums, would move too many codes."""
        return dict.fromkeys(rounded(graph.calls), "its bias would be rounded too coarsely")

    def session(self, graph: OnnxGraph, outputs: tuple[str, ...] = ()) -> tuple[Session, frozenset[str]]:
        with tempfile.TemporaryDirectory() as folder:  # ONNX Runtime tells what it made of a graph in a file only
            path = Path(folder) / "optimized.onnx"
            session = _session(graph.serialized(outputs), path)
            integer = _in_integers(graph, path)

        def run(feeds: Mapping[str, Tensor]) -> list[Tensor]:
            given = {name: x.detach().contiguous().numpy() for name, x in feeds.items()}
            return [torch.from_numpy(x) for x in session.run(None, given)]

        return run, integer


def _in_integers(graph: OnnxGraph, path: Path) -> frozenset[str]:
    """The layers whose products all run in integers, by the graph that ONNX Runtime made."""
    import onnx

    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type in _PRODUCTS]
    done = {name for node in nodes for name in (*node.input, *node.output)}

    def runs(call: Call) -> bool:
        return bool({call.weight, call.product, call.output} & done)

    return frozenset(name for name, calls in graph.calls.items() if all(map(runs, calls)))
