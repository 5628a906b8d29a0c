"""Modules that compute differently from the model they were made from, but are of the same class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.packed import PackedLayer, packed_layers, set_resident
from ..nn.quantize import quantized_layers


def of_class(model: nn.Module, forward: Callable[..., Any], modules: Mapping[str, nn.Module]) -> nn.Module:
    """Create an object of a subclass of the model's class, without its weights.

    Args:
        model: The model; attributes that are neither tensors nor modules (config, generation_config, …) are copied.
        forward: The object's forward, called with the same arguments.
        modules: Its submodules.

    Returns:
        The object, in evaluation mode.
    """
    parent = type(model)

    @wraps(parent.forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return forward(*args, **kwargs)

    dtype, device = torch.float32, torch.device("cpu")
    made: dict[str, Any] = {
        "forward": run,
        "_apply": _stay,
        "dtype": property(lambda _: dtype),
        "device": property(lambda _: device),
    }
    cls = type(parent.__name__, (parent,), {"__module__": parent.__module__, "__doc__": parent.__doc__, **made})
    out: nn.Module = nn.Module.__new__(cls)
    nn.Module.__init__(out)
    other = {"_parameters", "_buffers", "_modules", "forward", "_compiled_call_impl"}  # the last two call the model
    out.__dict__.update({k: v for k, v in vars(model).items() if k not in other and k not in out.__dict__})
    for name, module in modules.items():
        out.add_module(name, module)
    return out.eval()


def _stay(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`_apply` of a module of integers with scales, which cannot be cast or moved."""
    return module


def not_on_cpu(model: nn.Module) -> str | None:
    """Why a model cannot run on an engine for CPUs; None if it can."""
    for module in model.modules():
        packed = isinstance(module, PackedLayer)  # stores scales in 16 bits, and computes in another type
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type != "cpu":
                return f"expected a model on the CPU, got {tensor.device.type}"
            stored = packed and not isinstance(tensor, nn.Parameter)
            if not stored and tensor.dtype in (torch.float16, torch.bfloat16, torch.float64):
                return f"expected a model in float32, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def as_batch(example: Any) -> Any:
    """Wrap a batch as positional or keyword arguments; None stays None."""
    if example is None or isinstance(example, (tuple, Mapping)):
        return example
    return (example,)


def run(module: nn.Module, batch: Any) -> Any:
    """Call a module with a batch returned by `as_batch`."""
    return module(**batch) if isinstance(batch, Mapping) else module(*batch)


class _OnGrid(nn.Module):
    """Replaces a layer's `weight_quantizer` when the weight is already on its grid."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


@torch.no_grad()
def weights_on_grid(net: nn.Module) -> None:
    """Round the weights of a network's quantized layers to their grids once, instead of at every call.

    Args:
        net: The network; its layers are changed, but not their former Parameters.
    """
    settled: dict[int, nn.Parameter] = {}  # layers that share a weight keep sharing it
    for _, module in quantized_layers(net):
        if "weight_quantizer" not in module._modules:  # of a graph that reads only its weight
            continue
        weight = module.weight
        if id(weight) not in settled:
            settled[id(weight)] = nn.Parameter(module.weight_quantizer(weight).detach(), requires_grad=False)
        module._parameters["weight"], module.weight_quantizer = settled[id(weight)], _OnGrid()
    if any(True for _ in packed_layers(net)):
        set_resident(net, "float")
