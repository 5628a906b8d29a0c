"""Runtimes as targets: the bit-widths that a search may use so that a runtime computes them in integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from ..core import FLOAT_BITS, LayerBits, LayerGraph, LayerSpec, Runtime, runtimes
from ..core.target import Target
from .integer_layer import integer_menu

_CONTAINERS = "Widths below 8 bits take the time and memory of 8 bits; fewer bits only make the file smaller."
NOTES = {
    "onednn": (
        "oneDNN fuses the BatchNorm, activation and residual addition after a layer into it.",
        _CONTAINERS,
    ),
    "openvino": (
        "OpenVINO compiles the whole network, and fuses norms, activations and additions into the layers.",
        _CONTAINERS,
    ),
    "onnxruntime": (
        "ONNX Runtime fuses scale and bias into a linear layer, and computes a convolution in integers only if its "
        "output is quantized too.",
        _CONTAINERS,
    ),
    "bit_serial": (
        "A bit-serial layer fuses the BatchNorm and ReLU after it.",
        "Time grows with the product of the two bit-widths; only the narrowest pairs, such as W1A1, speed a layer up.",
    ),
}
"""{runtime that is a target: what it fuses, and what fewer than 8 bits gain}"""
EXACT_WITHOUT_VNNI = ("bit_serial",)
"""Runtimes whose sums never saturate, whatever the CPU."""


class RuntimeTarget(Target):
    """A runtime as a target, at the bit-widths that it computes exactly in integers on every x86 CPU.

    A policy is made on one machine and runs on others, so the menu is always that of a CPU without VNNI: it excludes
    W8A8, whose sums saturate there. Neither such a CPU nor the runtime needs to be present. Layers whose input is
    always float (embeddings, experts) run in float, and may have any weight bit-width.

    Args:
        runtime: The runtime.
        notes: Notes for its users, one sentence each.
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
            out.append(f"{stored} layers with float inputs (embeddings, experts) run in float.")
        if (why := self.runtime.available()) is not None:
            out.append(f"The runtime is not available on this machine: {why}.")
        elif any(set(self.runtime.menu(layer)) - set(self.menu(layer)) for layer in layers):
            out.append("This CPU computes W8A8 exactly too, but it is excluded because CPUs without VNNI do not.")
        return tuple(out)


def runtime_targets() -> Iterator[RuntimeTarget]:
    """Yield a target for each registered runtime that has notes."""
    for runtime in runtimes:
        if (notes := NOTES.get(runtime.name)) is not None:
            yield RuntimeTarget(runtime, notes, saturates=runtime.name not in EXACT_WITHOUT_VNNI)
