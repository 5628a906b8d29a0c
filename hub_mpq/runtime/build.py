"""A quantized model on the runtime of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..core import RuntimeLayers, runtimes
from ..errors import HubMPQError, InvalidArgument
from ..nn.types import device_of
from ..tasks import TaskLike, task_of, to_device
from ..tasks.batch import evaluating
from ..train.batches import first_batch
from ..train.evaluate import evaluate
from .certificate import Certificate, certificate, check_layers
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
            its tensors are those that speed is measured at; later batches may have others, on "openvino" and
            "onnxruntime" another batch and number of tokens only.
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
    module.eval()  # also what was put into it
    module.train = MethodType(_stay, module)  # type: ignore[method-assign]
    if not runtime.generates and hasattr(module, "generate"):
        able = " or ".join(repr(runtime.name) for runtime in runtimes if runtime.generates)
        module.generate = _refusal(f"runtime {name!r} does not generate; take {able}")  # type: ignore[assignment]
    if hasattr(module, "save_pretrained"):
        module.save_pretrained = _refusal(  # type: ignore[assignment]
            f"what runtime {name!r} runs has no weights to save; save the model that it was made from"
        )
    if layers.integer and batch is not None and not allow_inexact:
        with torch.no_grad():
            found = certificate(layers, check_layers(runtime.observe(module, batch), model))
        if not found.exact:
            raise HubMPQError(
                f"runtime {name!r} does not compute the same model: {found.reasons[0]}; allow_inexact=True takes it "
                "all the same"
            )
    return module


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in `train`: a module that only runs stays in evaluation mode, and with it norms that it shares."""
    return module


def _refusal(why: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise HubMPQError(why)

    return refuse


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


def certify(
    model: nn.Module, module: nn.Module, batches: Iterable[Any], *, task: TaskLike = None, example: Any = None
) -> Certificate:
    """Measure whether a module of `to_runtime` is the same model.

    Args:
        model: The quantized network that it was made from.
        module: The module.
        batches: Batches with labels or without; they are read several times. The layers are compared on the first, the
            metrics of the task on all; without labels, how often both say the same.
        task: What the model is for; None to find out.
        example: As in `hub_mpq.train.evaluate`.

    Raises:
        InvalidArgument: The module was not made by `to_runtime`.
    """
    layers = getattr(module, LAYERS, None)
    if layers is None:
        raise InvalidArgument(f"this {type(module).__name__} was not made by to_runtime: there is nothing to certify")
    first = to_device(first_batch(batches), device_of(model))
    known = task_of(task, model, first, example)
    args, kwargs = known.inputs(first)
    if args and kwargs:
        raise InvalidArgument("batches with both positional and keyword arguments cannot be certified; give a dict")
    with torch.no_grad(), evaluating(module):
        checks = check_layers(runtimes.get(layers.runtime).observe(module, kwargs or args), model)
    told: dict[str, Any] = {"task": task, "example": example}
    if known.labels(first) is not None:
        metrics = {"reference": evaluate(model, batches, **told), "runtime": evaluate(module, batches, **told)}
    else:
        found = evaluate(module, batches, reference=model, **told)
        same = {"agreement": 100.0} if "agreement" in found else {}
        metrics = {"reference": {**same, "samples": found["samples"]}, "runtime": found}
    return certificate(layers, checks, metrics)
