"""A module that computes by other means than the model it was made from, and is of its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Layers:
    """What a runtime does with each quantized layer.

    Args:
        runtime: Name of the runtime.
        integer: Names of the layers that compute in integers.
        float: {name: why it computes in float}.
    """

    runtime: str
    integer: tuple[str, ...]
    float: Mapping[str, str] = field(default_factory=dict)


def of_class(model: nn.Module, forward: Callable[..., Any], modules: Mapping[str, nn.Module]) -> nn.Module:
    """An object of a subclass of the model's class that has none of its weights.

    Args:
        model: The model; its attributes that are no tensors or modules (config, generation_config, …) are taken over.
        forward: What the object does when it is called; gets the same arguments.
        modules: Its submodules.
    """
    parent = type(model)

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return forward(*args, **kwargs)

    dtype, device = torch.float32, torch.device("cpu")
    made = {"forward": run, "dtype": property(lambda _: dtype), "device": property(lambda _: device)}
    cls = type(parent.__name__, (parent,), {"__module__": parent.__module__, "__doc__": parent.__doc__, **made})
    out: nn.Module = cls.__new__(cls)
    nn.Module.__init__(out)
    tensors = {"_parameters", "_buffers", "_modules"}
    out.__dict__.update({k: v for k, v in vars(model).items() if k not in tensors and k not in out.__dict__})
    for name, module in modules.items():
        out.add_module(name, module)
    return out.eval()
