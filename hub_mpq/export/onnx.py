"""A quantized model as ONNX with QuantizeLinear / DequantizeLinear nodes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from ..errors import HubMPQError
from ..pack import Manifest
from ..pack.atomic import write_atomic
from .onnx_layers import OPSET, with_nodes

FILE = "model.onnx"
_SCOPES = "pkg.torch.onnx.name_scopes"


class Call(NamedTuple):
    """Names of tensors of one call of a layer with integer inputs and weights.

    Args:
        codes: Its input's codes, UINT8.
        values: The same, dequantized.
        product: Of convolution or matrix product.
        output: With the bias.
    """

    codes: str
    values: str
    product: str
    output: str


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A quantized model as ONNX, in memory.

    Args:
        proto: The ModelProto. A node that makes codes has the name of its output.
        calls: {layer with integer inputs and weights: its calls}.
        kept: {layer that no engine can compute in integers: why}.
        structure: Of what the forward returns, as torch's pytree.
        leaves: Of the structure: None for a tensor, in the order of the graph's outputs; else (the value,).
    """

    proto: Any
    calls: dict[str, list[Call]]
    kept: dict[str, str]
    structure: TreeSpec
    leaves: list[tuple[Any] | None]

    def serialized(self, outputs: tuple[str, ...] = ()) -> bytes:
        """The bytes of the model; `outputs`: further tensors that it returns, behind its own outputs."""
        proto = self.proto
        if outputs:
            proto = type(proto)()
            proto.CopyFrom(self.proto)
            for name in outputs:
                proto.graph.output.add().name = name
        out: bytes = proto.SerializeToString()
        return out


def missing_packages() -> str | None:
    """What to install before a model can be written as ONNX; None when nothing is missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        return f"ONNX needs pip install 'hub-mpq[onnx]' ({error})"
    return None


def export_onnx(
    folder: str | os.PathLike[str], model: nn.Module, manifest: Manifest, config: Mapping[str, Any], example: Any
) -> int:
    """Write `model.onnx` (opset 21, batch size free) of a quantized model; returns its bytes.

    example: one sample, a tuple of positional arguments or a mapping of keyword arguments. Needs the extra "onnx".
    Raises HubMPQError when it is not installed, or when the model can't be traced.
    """
    proto = onnx_graph(model, example).proto
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomic(folder / FILE, [proto.SerializeToString()])


def onnx_graph(model: nn.Module, example: Any, floats: Collection[str] = ()) -> OnnxGraph:
    """A quantized model as an ONNX graph in memory.

    Args:
        model: The network with its quantizers or packed weights, on the CPU.
        example: A tuple of positional arguments or a mapping of keyword arguments, tensors.
        floats: Layers to write in float, with the same values.

    Raises:
        HubMPQError: A package is missing, or the model can't be traced.
    """
    if (why := missing_packages()) is not None:
        raise HubMPQError(why)
    import onnx

    net, kept = with_nodes(model, floats)
    example = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x, example)  # 1 is special
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
    try:
        with torch.no_grad(), _quiet():
            leaves, structure = tree_flatten(net(*args, **kwargs))
            program = torch.onnx.export(
                net,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=_free(args, kwargs),
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        first = str(cause).strip().partition("\n")[0]
        raise HubMPQError(f"torch.onnx can't trace {type(model).__name__}: {first}") from error
    proto = program.model_proto  # type: ignore[union-attr]
    for part in (proto, proto.graph, *proto.graph.value_info, *proto.graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    calls = _calls(proto.graph)
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces with paths of this machine
        node.ClearField("doc_string")
    onnx.checker.check_model(proto)
    constants = [None if isinstance(x, Tensor) else (x,) for x in leaves]
    return OnnxGraph(proto, calls, kept, structure, constants)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No word of torch.onnx or of what it calls, on any stream: what goes wrong is raised."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


_PRODUCTS = ("Conv", "MatMul", "Gemm")


def _calls(graph: Any) -> dict[str, list[Call]]:
    """{layer: its calls} of the layers with QuantizeLinear nodes, which are named as their outputs."""
    made = {out: node for node in graph.node for out in node.output}
    scopes = {id(node): _scope(node) for node in graph.node}
    found: dict[str, list[Call]] = {}
    for node in graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        x, weight = (_dequantized(made, name) for name in node.input[:2])
        if x is None or weight is None or x.input[0] not in made:
            continue
        layer, call = scopes[id(node)]
        out = node.output[0]
        for user in graph.node:  # the bias of a product, added by a node of the same call
            if out in user.input and scopes[id(user)] == (layer, call):
                out = user.output[0]
        found.setdefault(layer, []).append(Call(x.input[0], x.output[0], node.output[0], out))
        made[x.input[0]].name = x.input[0]
    return found


def _scope(node: Any) -> tuple[str, str]:
    """(name of the innermost module, name of the torch operation) that a node was made by."""
    import ast

    told = next((p.value for p in node.metadata_props if p.key == _SCOPES), "['', '']")
    *modules, call = ast.literal_eval(told)
    return modules[-1] if modules else "", call


def _dequantized(made: Mapping[str, Any], name: str) -> Any:
    """The DequantizeLinear that a tensor, or what it is a view of, comes from; None where it comes from none."""
    node = made.get(name)
    while node is not None and node.op_type in ("Transpose", "Reshape"):
        node = made.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _free(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first axis of every tensor is the batch; the second one of token ids is free where the model lets it."""
    batch, tokens = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO

    def axes(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return None
        return {0: batch, 1: tokens} if x.dim() == 2 and not x.is_floating_point() else {0: batch}

    return {k: axes(v) for k, v in kwargs.items()} if kwargs else tuple(axes(x) for x in args)
