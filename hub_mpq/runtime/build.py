"""Build a quantized model for a runtime, and certify that it is the same model."""

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
"""Name of the attribute of a built module that holds its `RuntimeLayers`."""


def to_runtime(model: nn.Module, name: str = "auto", example: Any = None, *, allow_inexact: bool = False) -> nn.Module:
    """Convert a quantized model to a module that computes on a runtime.

    Each layer runs once on the example and is compared with its exact result; see `Certificate`.

    Args:
        model: A quantized network: `HubMPQ.model`, or what `AutoModel*.from_pretrained` loads from a packed folder. It
            is not changed; its float weights are shared.
        name: `"torch"`, `"onednn"`, `"openvino"`, `"onnxruntime"`, `"bit_serial"`, or a registered runtime. `"auto"`
            selects `"onednn"` where it can run the model, else `"torch"`.
        example: One batch: a tensor, a tuple of positional arguments or a mapping of keyword arguments. Speed is
            optimized for its sizes. Later batches may have other sizes; on `"openvino"` and `"onnxruntime"`, only the
            batch size and the number of tokens may change.
        allow_inexact: Return the module even if it is not the same model within the bounds of `Certificate`.

    Returns:
        A module with the model's forward, in evaluation mode. Its attribute `runtime_layers` tells which layers compute
        in integers, and why the others do not.

    Raises:
        InvalidArgument: The runtime is unknown, the model is not quantized, or an example is required.
        HubMPQError: The runtime is not available, or its module is not the same model.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ, to_runtime
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> mpq = mpq.apply_policy("W4A4", [images])
        >>> module = to_runtime(mpq.model, "auto", images)
        >>> module(images).shape
        torch.Size([1, 1000])
        >>> module.runtime_layers.runtime in ("onednn", "torch")
        True
    """
    if not any(layer_form(module) is not None for module in model.modules()):
        raise InvalidArgument(f"{type(model).__name__} is not quantized; apply a policy or load a packed folder")
    if name == "auto":
        return _auto(model, example)
    runtime = runtimes.get(name)
    if (why := runtime.available()) is not None:
        raise HubMPQError(f"runtime {name!r} is not available: {why}")
    batch = as_batch(example)
    module, layers = runtime.build(model, batch)
    setattr(module, LAYERS, layers)
    module.eval()  # its new submodules too
    module.train = MethodType(_stay, module)  # type: ignore[method-assign]
    if not runtime.generates and hasattr(module, "generate"):
        able = " or ".join(repr(runtime.name) for runtime in runtimes if runtime.generates)
        module.generate = _refusal(  # type: ignore[assignment]
            f"runtime {name!r} does not support generate(); use {able}"
        )
    if hasattr(module, "save_pretrained"):
        module.save_pretrained = _refusal(  # type: ignore[assignment]
            f"a module of runtime {name!r} cannot be saved; save the model that it was made from"
        )
    if layers.integer and batch is not None and not allow_inexact:
        with torch.no_grad():
            found = certificate(layers, check_layers(runtime.observe(module, batch), model))
        if not found.exact:
            raise HubMPQError(
                f"runtime {name!r} does not compute the same model: {found.reasons[0]}; pass allow_inexact=True to "
                "use it anyway"
            )
    return module


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train`: a module for inference stays in evaluation mode, and so do the norms that it shares."""
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

    The layers are compared on the first batch, and the metrics of the task on all batches; without labels, the metric
    is the agreement of the two models.

    Args:
        model: The quantized network that the module was made from.
        module: The module.
        batches: Batches with or without labels; they are iterated several times.
        task: The model's task; None to detect it.
        example: One sample, where the task cannot be detected from a batch; see `hub_mpq.train.evaluate`.

    Returns:
        The certificate.

    Raises:
        InvalidArgument: The module was not made by `to_runtime`, or the batches have both positional and keyword
            arguments.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ, to_runtime
        >>> from hub_mpq.runtime import certify
        >>> images = torch.zeros(2, 3, 32, 32)
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> mpq = mpq.apply_policy("W4A4", [images])
        >>> certificate = certify(mpq.model, to_runtime(mpq.model, "auto", images), [images])
        >>> certificate.exact
        True
    """
    layers = getattr(module, LAYERS, None)
    if layers is None:
        raise InvalidArgument(f"expected a module made by to_runtime, got {type(module).__name__}")
    first = to_device(first_batch(batches), device_of(model))
    known = task_of(task, model, first, example)
    args, kwargs = known.inputs(first)
    if args and kwargs:
        raise InvalidArgument("batches must not have both positional and keyword arguments; pass dicts")
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
