"""The interface of a runtime (a library that executes quantized models), and the registry of runtimes."""

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
    """How a runtime computes each quantized layer of a model.

    Args:
        runtime: Name of the runtime.
        integer: Names of the layers that compute in integers.
        float: {layer: why it computes in float}.

    Example:
        >>> from hub_mpq.core import RuntimeLayers
        >>> layers = RuntimeLayers("onednn", integer=("conv1",), float={"fc": "its input stays float"})
        >>> len(layers.integer), layers.float["fc"]
        (1, 'its input stays float')
    """

    runtime: str
    integer: tuple[str, ...]
    float: Mapping[str, str] = field(default_factory=dict)


class Runtime(ABC):
    """A library that executes quantized models.

    Attributes:
        name: Name of the runtime, as in `runtime=` and `--runtime`.
        generates: Whether its models support `generate`.
        time_by_width: Whether a layer's time depends on its bit-widths. False if one kernel computes the whole menu.
        package: Distribution and module that does the computation; figures are reported with its version.
        extra: Extra of hub-mpq that installs it; "" if none is needed.

    Example:
        >>> from hub_mpq.core import runtimes
        >>> runtimes.get("torch").available() is None
        True
    """

    name: str
    generates: ClassVar[bool] = False
    time_by_width: ClassVar[bool] = False
    package: ClassVar[str] = "torch"
    extra: ClassVar[str] = ""

    def available(self) -> str | None:
        """Return why the runtime cannot be used on this machine.

        Returns:
            The reason in a few words; None if the runtime can be used.
        """
        if self.extra:
            try:
                import_module(self.package)
            except Exception as error:  # a package that fails to load raises an OSError or an error of its own type
                return f"it requires `pip install 'hub-mpq[{self.extra}]'` ({error})"
        return None

    @abstractmethod
    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """Return the bit-widths at which a layer is computed exactly, in integers, on this CPU.

        Args:
            layer: The layer.

        Returns:
            The bit-widths, ascending; () if there are none.
        """

    @abstractmethod
    def build(self, model: Any, example: Any) -> tuple[Any, RuntimeLayers]:
        """Build a module that computes the forward pass of a model on this runtime.

        Args:
            model: The quantized network (an `nn.Module`), with quantizers or packed; it is not modified.
            example: One batch: a tuple of positional arguments or a mapping of keyword arguments. Later calls may have
                other batch sizes and lengths.

        Returns:
            (the module, its `RuntimeLayers`). The module is an instance of the model's class or a subclass where that
            is meaningful.

        Raises:
            HubMPQError: The model cannot run on this runtime, with the reason.
        """

    @abstractmethod
    def observe(self, module: Any, batch: Any) -> Iterable[Any]:
        """Record the inputs and outputs of all layers that compute in integers, to compare them with the exact result.

        Args:
            module: A module made by `build`.
            batch: One batch, like `example` of `build`.

        Returns:
            A `hub_mpq.runtime.certificate.LayerRun` for each layer.
        """


runtimes: Registry[Runtime] = Registry("runtime", "hub_mpq.runtime")
"""All runtimes."""

R = TypeVar("R", bound=Runtime)


def register_runtime(runtime: R) -> R:
    """Register a runtime.

    Args:
        runtime: The runtime; its name must be new.

    Returns:
        The same runtime.

    Raises:
        InvalidArgument: The name is not valid, or another runtime has it.

    Example:
        >>> from hub_mpq import Runtime, register_runtime
        >>> class Mine(Runtime):
        ...     name = "mine"
        ...
        ...     def menu(self, layer):
        ...         return ()
        ...
        ...     def build(self, model, example): ...  # return (module, RuntimeLayers)
        ...
        ...     def observe(self, module, batch):
        ...         return []
        >>> runtime = register_runtime(Mine())
    """
    return runtimes.register(getattr(runtime, "name", ""), runtime)  # type: ignore[return-value]
