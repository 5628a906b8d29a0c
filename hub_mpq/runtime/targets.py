"""Runtimes as targets: what a policy is searched over that a runtime is to execute in integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from ..core import FLOAT_BITS, LayerBits, LayerGraph, LayerSpec, Runtime, runtimes
from ..core.target import Target
from .integer_layer import integer_menu

_CONTAINERS = "Below 8 bits it takes the time and memory of 8 bits: fewer bits save bytes of the file alone."
NOTES = {
    "onednn": (
        "oneDNN computes the BatchNorm, activation and residual addition behind a layer together with it.",
        _CONTAINERS,
    ),
    "openvino": (
        "OpenVINO compiles the whole network, and computes norms, activations and additions together with the layers.",
        _CONTAINERS,
    ),
    "onnxruntime": (
        "ONNX Runtime computes scale and bias together with a linear layer, and a convolution in integers only where "
        "its output is quantized too.",
        _CONTAINERS,
    ),
    "bit_serial": (
        "A bit-serial layer computes the BatchNorm and ReLU behind it together with its product.",
        "Time grows with the product of the two widths: only the narrowest pairs, such as W1A1, make a layer faster.",
    ),
}
"""{runtime: what it fuses, and what bits below 8 buy}: the runtimes that are targets."""
EXACT_WITHOUT_VNNI = ("bit_serial",)
"""The runtimes whose sums saturate on no CPU."""


class RuntimeTarget(Target):
    """A runtime, at widths that it computes in integers exactly on every x86 CPU.

    A policy is made on one machine and runs on others, so the menu is always that of a CPU without VNNI: W8A8, whose
    sums saturate there, is not in it. Neither such a CPU nor the runtime has to be at hand. Layers whose input stays
    float in any case (embeddings, experts) run in float, and have every width of the weight.

    Args:
        runtime: The runtime.
        notes: What a user of it should know, one sentence each.
        saturates: Whether its sums saturate on CPUs without VNNI.
    """

    weight_only: ClassVar[bool] = False

    def __init__(self, runtime: Runtime, notes: tuple[str, ...] = (), *, saturates: bool = True) -> None:
        self.runtime, self.name, self.saturates, self._notes = runtime, runtime.name, saturates, notes

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        if layer.weight_only:
            return tuple(LayerBits(width, FLOAT_BITS) for width in range(1, 9))
        return integer_menu(layer, self.saturates)

    def notes(self, graph: LayerGraph) -> tuple[str, ...]:
        out = list(self._notes)
        layers = [layer for layer in graph if not layer.weight_only]
        if stored := len(graph) - len(layers):
            out.append(f"{stored} layers whose input is float (embeddings, experts) are read in float.")
        if (why := self.runtime.available()) is not None:
            out.append(f"It cannot be used on this machine: {why}.")
        elif any(set(self.runtime.menu(layer)) - set(self.menu(layer)) for layer in layers):
            out.append("This CPU computes W8A8 exactly too; it is no choice, since CPUs without VNNI do not.")
        return tuple(out)


def runtime_targets() -> Iterator[RuntimeTarget]:
    """A target for each registered runtime that has notes."""
    for runtime in runtimes:
        if (notes := NOTES.get(runtime.name)) is not None:
            yield RuntimeTarget(runtime, notes, saturates=runtime.name not in EXACT_WITHOUT_VNNI)
