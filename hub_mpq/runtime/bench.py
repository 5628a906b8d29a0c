"""Benchmark a quantized model on a runtime against its float form in torch: time, memory, and exactness."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters.restore_state import copied_structure
from ..core import RuntimeLayers
from ..nn.layers import call_only, replace_layer, take_over
from ..nn.packed import float_layer, packed_layers
from ..nn.quantize import quantized_layers
from . import machine as here
from .certificate import Certificate, certificate, check_layers
from .integer_layer import integer_layers
from .latency import runtime_here
from .rebuilt import run
from .timing import Timing, batch_of, threads_of, time_calls


@dataclass(frozen=True)
class RuntimeBench:
    """Measurements of a model on a runtime.

    Args:
        layers: Which layers the runtime computes in integers, and why not the others.
        engine: The library that computes, with its version.
        machine: Description of processor, cores and instruction set.
        batch_size: Samples per call.
        threads: Threads that a call may use.
        runtime: Time of a call on the runtime.
        float: Time of a call of the float model in torch; the two calls are timed alternately.
        integer_nbytes: Bytes of the layers that compute in integers: int8 codes, scales and biases.
        float_nbytes: Bytes of the same layers in float32.
        certificate: Certificate of one run of each layer.
    """

    layers: RuntimeLayers
    engine: str
    machine: str
    batch_size: int
    threads: int
    runtime: Timing
    float: Timing
    integer_nbytes: int
    float_nbytes: int
    certificate: Certificate

    @property
    def speedup(self) -> Any:
        """Time of the float model divided by time of the runtime."""
        return self.float.seconds / self.runtime.seconds

    def to_json(self) -> dict[str, Any]:
        """Return all fields and the speedup as JSON values."""
        found = {**asdict(self), "certificate": self.certificate.to_json(), "speedup": self.speedup}
        return {**found, "layers": {"integer": list(self.layers.integer), "float": dict(self.layers.float)}}


def float_network(model: nn.Module) -> nn.Module:
    """Remove the quantizers of a quantized network and round its weights to their grids: plain float arithmetic."""
    net = copied_structure(model).eval()
    for name, module in list(quantized_layers(net)):
        out = take_over(module.float_class, module)
        call_only(out, False)
        out._parameters = {**out._parameters, "weight": nn.Parameter(module.weight_quantizer(module.weight), False)}
        out._modules = {k: v for k, v in out._modules.items() if k not in ("weight_quantizer", "input_quantizer")}
        replace_layer(net, name, out)
    for name, packed in list(packed_layers(net)):
        replace_layer(net, name, float_layer(packed, torch.float32))
    return net


@torch.no_grad()
def bench_runtime(model: nn.Module, name: str, example: Any, *, batch_size: int = 1, threads: int = 1) -> RuntimeBench:
    """Time a quantized network on a runtime, alternating with its float form in torch, and check each layer.

    Args:
        model: The quantized network, on the CPU; it is not changed.
        name: Name of the runtime.
        example: One sample: positional arguments or a mapping of keyword arguments.
        batch_size: Samples per call.
        threads: Threads that a call may use.

    Returns:
        The measurements.

    Raises:
        HubMPQError: The runtime is not available, or cannot run the model.
    """
    engine, batch = runtime_here(name), batch_of(example, batch_size)
    with threads_of(threads):
        module, layers = engine.build(model, batch)
        found = certificate(layers, check_layers(engine.observe(module, batch), model))
        ours, plain = time_calls([partial(run, module, batch), partial(run, float_network(model), batch)], seconds=1.0)
    known, _ = integer_layers(model)
    used = [known[layer] for layer in layers.integer]
    floats = [4 * layer.weight.numel() + (0 if layer.bias is None else layer.bias.nbytes) for layer in used]
    integers = [x.weight.nbytes + x.scale.nbytes + (0 if x.bias is None else x.bias.nbytes) for x in used]
    return RuntimeBench(
        layers=layers,
        engine=here.engine(engine),
        machine=here.machine(),
        batch_size=batch_size,
        threads=threads,
        runtime=ours,
        float=plain,
        integer_nbytes=sum(integers),
        float_nbytes=sum(floats),
        certificate=found,
    )
