"""Export of a quantized model as ONNX with QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from ..errors import HubMPQError
from ..pack import Manifest
from ..pack.atomic import write_atomic
from .onnx_calls import Call, find_calls, rounded, scope
from .onnx_layers import OPSET, with_nodes
from .onnx_norms import fold_norms

FILE = "model.onnx"


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A quantized model as ONNX, in memory.

    Args:
        proto: The ModelProto. A node that makes codes has the name of its output.
        calls: {layer with integer inputs and weights: its calls}.
        widths: {layer with integer inputs and weights: bits of its weight and its input}.
        kept: {layer that no engine can compute in integers: reason}.
        structure: Structure of what the forward returns, as a torch pytree.
        leaves: Leaves of the structure: None for a tensor, in the order of the graph's outputs; else (the value,).
    """

    proto: Any
    calls: dict[str, list[Call]]
    widths: dict[str, tuple[int, int]]
    kept: dict[str, str]
    structure: TreeSpec
    leaves: list[tuple[Any] | None]

    def serialized(self, outputs: tuple[str, ...] = ()) -> bytes:
        """Serialize the model; `outputs`: further tensors that it returns after its own outputs."""
        proto = self.proto
        if outputs:
            proto = type(proto)()
            proto.CopyFrom(self.proto)
            for name in outputs:
                proto.graph.output.add().name = name
        out: bytes = proto.SerializeToString()
        return out


def missing_packages() -> str | None:
    """What to install for ONNX; None if nothing is missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except Exception as error:  # a shared library that cannot be loaded raises OSError
        return f"ONNX requires extra packages; pip install 'hub-mpq[onnx]' ({error})"
    return None


def export_onnx(
    folder: str | os.PathLike[str], model: nn.Module, manifest: Manifest, config: Mapping[str, Any], example: Any
) -> int:
    """Write `model.onnx` (opset 21, dynamic batch size) of a quantized model; returns its size in bytes.

    Weights are INT8 and activations UINT8 at every bit-width, since that is what engines multiply in integers; fewer
    than 8 bits do not make the file smaller. Inputs of fewer than 8 bits are clipped before QuantizeLinear. The values
    are the same as in torch, so only the float sums differ. A norm is folded into the preceding convolution if this
    changes few codes, which lets ONNX Runtime compute the convolution in integers: it rounds biases to steps of integer
    sums. Warns about layers that stay float, and about layers whose sums can saturate on some CPUs.

    Args:
        folder: Folder to write to.
        model: The network, with quantizers or packed weights.
        manifest: The manifest of its packed file; not used.
        config: Content of config.json; not used.
        example: One sample: a tuple of positional arguments or a mapping of keyword arguments.

    Raises:
        HubMPQError: The extra "onnx" is not installed, or the model cannot be traced.
    """
    graph = onnx_graph(model, example, rounds=True)
    for what in _told(graph):
        warnings.warn(what, stacklevel=2)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomic(folder / FILE, [graph.serialized()])


def _told(graph: OnnxGraph) -> list[str]:
    """Warnings about how a runtime will execute the file."""
    found = []
    reasons: dict[str, list[str]] = {}
    for name, why in graph.kept.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        found.append(f"ONNX: {len(names)} layers compute in float (first: {names[0]!r}): {why}")
    if wide := [name for name, bits in graph.widths.items() if bits == (8, 8)]:
        found.append(
            f"ONNX: sums of {len(wide)} layers at W8A8 (first: {wide[0]!r}) can saturate on CPUs without VNNI; use "
            "W7A8 to avoid this"
        )
    return found


def onnx_graph(
    model: nn.Module, example: Any, floats: Collection[str] = (), *, clip_codes: bool = False, rounds: bool = False
) -> OnnxGraph:
    """Convert a quantized model to an ONNX graph in memory.

    Args:
        model: The network, with quantizers or packed weights, on the CPU.
        example: A tuple of positional arguments or a mapping of keyword arguments, all tensors.
        floats: Layers to write in float, with the same values.
        clip_codes: Clip inputs of fewer than 8 bits after QuantizeLinear instead of before it.
        rounds: Write the graph so that engines that round float biases and weights between quantized tensors, such as
            ONNX Runtime, compute the same.

    Returns:
        The graph.

    Raises:
        HubMPQError: A package is not installed, or the model cannot be traced.
    """
    if (why := missing_packages()) is not None:
        raise HubMPQError(why)
    import onnx

    net, widths, kept = with_nodes(model, floats, clip_codes=clip_codes, rounds=rounds)
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
        raise HubMPQError(f"torch.onnx cannot trace {type(model).__name__}: {first}") from error
    proto = program.model_proto  # type: ignore[union-attr]
    for part in (proto, proto.graph, *proto.graph.value_info, *proto.graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    kept_norms: list[str] = []
    if rounds:
        trial = type(proto)()
        trial.CopyFrom(proto)
        fold_norms(trial.graph)
        kept_norms = rounded(find_calls(trial.graph, {}))
    folded = {output: scope(norm) for output, norm in fold_norms(proto.graph, kept_norms).items()}
    calls = find_calls(proto.graph, folded)
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces with paths of this machine
        node.ClearField("doc_string")
    onnx.checker.check_model(proto)
    constants = [None if isinstance(x, Tensor) else (x,) for x in leaves]
    return OnnxGraph(proto, calls, widths, kept, structure, constants)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings, logs and (onnxscript 0.6) printed lines of torch.onnx; errors are raised anyway."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _free(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Dynamic axes: the first axis of each tensor is the batch; the second axis of token ids if the model allows it."""
    batch, tokens = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO

    def axes(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return None
        return {0: batch, 1: tokens} if x.dim() == 2 and not x.is_floating_point() else {0: batch}

    return {k: axes(v) for k, v in kwargs.items()} if kwargs else tuple(axes(x) for x in args)
