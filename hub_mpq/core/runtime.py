"""What runs a quantized model: the interface of a runtime, and the registry of all runtimes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from .bits import LayerBits
from .layer import LayerSpec
from .registry import Registry


@dataclass(frozen=True)
class RuntimeLayers:
    """What a runtime does with each quantized layer of a model.

    Args:
        runtime: Name of the runtime.
        integer: Names of the layers that compute in integers.
        float: {name: why it computes in float}.
    """

    runtime: str
    integer: tuple[str, ...]
    float: Mapping[str, str] = field(default_factory=dict)


class Runtime(ABC):
    """A library that executes quantized models.

    Attributes:
        name: Name of the runtime, as `runtime=` and `--runtime`.
        generates: Whether models that it runs can `generate`.
        time_by_width: Whether a layer's time depends on its widths. False: one kernel computes all of the menu.
        package: The distribution and module that computes, whose version figures are of.
        extra: The extra of hub-mpq that installs it; "" where nothing needs to be.
    """

    name: str
    generates: ClassVar[bool] = False
    time_by_width: ClassVar[bool] = False
    package: ClassVar[str] = "torch"
    extra: ClassVar[str] = ""

    def available(self) -> str | None:
        """Why the runtime cannot be used on this machine, in a few words; None when it can."""
        if self.extra:
            try:
                import_module(self.package)
            except Exception as error:  # what an installed package cannot load is an OSError, or of its own kind
                return f"it needs pip install 'hub-mpq[{self.extra}]' ({error})"
        return None

    @abstractmethod
    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """All widths at which it computes a layer in integers and exactly on this CPU, ascending; () where none."""

    @abstractmethod
    def build(self, model: Any, example: Any) -> tuple[Any, RuntimeLayers]:
        """A module with the forward of `model` that computes on this runtime.

        Args:
            model: The quantized network (an nn.Module), with quantizers or packed; it stays as it is.
            example: One batch, a tuple of positional arguments or a mapping of keyword arguments. Batch and length of
                later calls may differ.

        Returns:
            (the module, an object of the model's class or of a subclass where that has a meaning; its layers).

        Raises:
            HubMPQError: The model cannot run here, with the reason.
        """

    @abstractmethod
    def observe(self, module: Any, batch: Any) -> Iterable[Any]:
        """What each layer that computes in integers got and gave in one run, to compare with the exact result.

        Args:
            module: As `build` made it.
            batch: As `example` of `build`.

        Returns:
            A `hub_mpq.runtime.certificate.LayerRun` for each layer.
        """


runtimes: Registry[Runtime] = Registry("runtime", "hub_mpq.runtime")
"""All runtimes."""

R = TypeVar("R", bound=Runtime)


def register_runtime(runtime: R) -> R:
    """Make a runtime known by its name, and return it.

    Raises:
        InvalidArgument: The name is not a word, or another runtime has it.
    """
    return runtimes.register(getattr(runtime, "name", ""), runtime)  # type: ignore[return-value]
