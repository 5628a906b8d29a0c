"""A quantized model on the runtime of one's choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core import RuntimeLayers, runtimes
from ..errors import HubMPQError, InvalidArgument
from .certificate import certificate, check_layers
from .integer_layer import layer_form
from .rebuilt import as_batch

LAYERS = "runtime_layers"
"""Name of the attribute of a built module that says what became of each layer."""


def to_runtime(model: nn.Module, name: str = "auto", example: Any = None, *, allow_inexact: bool = False) -> nn.Module:
    """A module with the forward of a quantized model that computes on a runtime.

    Each layer is run once on the example and compared with its exact result, see `hub_mpq.runtime.certificate`.

    Args:
        model: A quantized network: `HubMPQ.model`, or what `AutoModel*.from_pretrained` makes of a packed folder. It
            stays as it is; weights that stay float are shared.
        name: "torch", "onednn", "openvino", "onnxruntime", "bit_serial", or one that was registered. "auto": "onednn"
            where it can be used, else "torch".
        example: One batch, a tensor, a tuple of positional arguments or a mapping of keyword arguments. The sizes of
            its tensors are those that speed is measured at; later batches may have others.
        allow_inexact: Also return a module that is not the same model by the bounds of the certificate.

    Returns:
        The module, in evaluation mode; its attribute `runtime_layers` says which layers compute in integers, and why
        the others do not.

    Raises:
        InvalidArgument: An unknown runtime, or the model is not quantized.
        HubMPQError: The runtime cannot be used here, or what it computes is not the same model.
    """
    if not any(layer_form(module) is not None for module in model.modules()):
        raise InvalidArgument(f"{type(model).__name__} is not quantized: apply a policy to it, or load a packed folder")
    if name == "auto":
        return _auto(model, example)
    runtime = runtimes.get(name)
    if (why := runtime.available()) is not None:
        raise HubMPQError(f"runtime {name!r} cannot be used here: {why}")
    batch = as_batch(example)
    module, layers = runtime.build(model, batch)
    setattr(module, LAYERS, layers)
    if layers.integer and batch is not None and not allow_inexact:
        with torch.no_grad():
            found = certificate(layers, check_layers(runtime.observe(module, batch)))
        if not found.exact:
            raise HubMPQError(
                f"runtime {name!r} does not compute the same model: {found.reasons[0]}; allow_inexact=True takes it "
                "all the same"
            )
    return module


def _auto(model: nn.Module, example: Any) -> nn.Module:
    try:
        return to_runtime(model, "onednn", example)
    except InvalidArgument:
        raise
    except HubMPQError as error:
        module = to_runtime(model, "torch", example)
        kept: RuntimeLayers = getattr(module, LAYERS)
        setattr(module, LAYERS, RuntimeLayers("torch", (), dict.fromkeys(kept.float, str(error))))
        return module
