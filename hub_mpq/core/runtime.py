"""What runs a quantized model: the interface of a runtime, and the registry of all runtimes."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from .layer import LayerGraph, LayerSpec
from .registry import Registry
from .result import Policy


class Runtime(Protocol):
    """A program or a library that executes a policy.

    Attributes:
        name: Name of the runtime, as `runtime=` and `--runtime`.
    """

    name: str

    def available(self) -> str | None:
        """Why the runtime cannot be used on this machine, in a few words; None when it can."""

    def menu(self, layer: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(weight widths, activation widths) that it runs natively and exactly for a layer; 32 is float."""

    def build(self, model: Any, graph: LayerGraph, example: Any) -> Any:
        """A module with the forward of `model` that computes on this runtime.

        Args:
            model: The quantized network (an nn.Module).
            graph: Its layers.
            example: One sample, as the network takes it.
        """

    def certificate(self, model: Any, graph: LayerGraph, policy: Policy) -> dict[str, Any]:
        """What shows that the built module is the same model, JSON values only."""


runtimes: Registry[Runtime] = Registry("runtime")
"""All runtimes."""

R = TypeVar("R", bound=Runtime)


def register_runtime(runtime: R) -> R:
    """Make a runtime known by its name, and return it.

    Raises:
        InvalidArgument: The name is not a word, or another runtime has it.
    """
    return runtimes.register(getattr(runtime, "name", ""), runtime)  # type: ignore[return-value]
