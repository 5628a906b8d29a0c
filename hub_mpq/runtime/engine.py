"""Base of the runtimes that pass the whole network to an engine, as an ONNX graph."""

from __future__ import annotations

import inspect
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from ..core import LayerBits, LayerSpec, Runtime, RuntimeLayers
from ..errors import HubMPQError, InvalidArgument
from ..export.onnx import OnnxGraph, missing_packages, onnx_graph
from ..export.onnx_calls import Call
from .certificate import LayerRun
from .exchanged import without_codes
from .fused_layer import Activation, FusedLayer
from .integer_layer import Grid, inexact_sums, integer_layers, integer_menu, layer_form
from .rebuilt import not_on_cpu, of_class

Session = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""Runs a graph: from its inputs by name to its outputs."""

_DEFAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": torch.ones_like,
    "token_type_ids": torch.zeros_like,
}
"""What a transformers model uses for an input that is not passed."""
_NETWORK = "engine_network"
_REFUSED = ("output_attentions", "output_hidden_states")
_IGNORED = ("return_dict", "use_cache", *_REFUSED)
"""Arguments that are not tensors and do not change the numbers."""


@dataclass(eq=False)
class _Inputs:
    """The arguments of a forward as inputs of a graph.

    Args:
        signature: Signature of the forward.
        dtypes: {input of the graph: its type}.
        filled: Inputs that a call may omit, see `_DEFAULTS`.
    """

    signature: inspect.Signature
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    filled: tuple[str, ...] = ()

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """{parameter: argument}, without None."""
        found = dict(self.signature.bind(*args, **kwargs).arguments)
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                found |= found.pop(parameter.name, {})
        return {name: value for name, value in found.items() if value is not None}

    def feeds(self, bound: Mapping[str, Any]) -> dict[str, Tensor]:
        """The graph's inputs.

        Raises:
            HubMPQError: The arguments do not match the example that the graph was traced with.
        """
        given = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
        if unknown := [name for name in given if name not in self.dtypes]:
            raise HubMPQError(f"unexpected input {unknown[0]!r}: the runtime was built for an example without it")
        for name in self.filled:
            if name not in given and "input_ids" in given:
                given[name] = _DEFAULTS[name](given["input_ids"])
        if missing := [name for name in self.dtypes if name not in given]:
            raise HubMPQError(f"missing input {missing[0]!r}: the runtime was built for an example with it")
        for name, value in bound.items():
            if name not in given and not self._as_traced(name, value):
                raise HubMPQError(
                    f"unexpected argument {name}={value!r:.40}: the runtime takes only tensors, and was built for an "
                    "example without it"
                )
        return {name: self._typed(name, value) for name, value in given.items()}

    def _as_traced(self, name: str, value: Any) -> bool:
        """Whether a non-tensor argument asks for what the graph does anyway."""
        if name in _IGNORED:
            return True
        default = self.signature.parameters[name].default if name in self.signature.parameters else None
        return type(value) is type(default) and bool(value == default)

    def _typed(self, name: str, value: Tensor) -> Tensor:
        """Convert integers and masks to the type of the example; the engine rejects other types."""
        dtype = self.dtypes[name]
        return value if value.is_floating_point() or dtype.is_floating_point else value.to(dtype)


@dataclass(eq=False)
class EngineNetwork:
    """The forward of a model, computed by an engine; thread-safe.

    Args:
        inputs: Maps arguments to the graph's inputs.
        session: Runs the graph.
        output: Turns the graph's outputs into the forward's output.
        example: Inputs that the graph was traced with.
        graph: The graph, until its next use; it holds a second copy of all weights.
        model: Weak reference to the model that it was made from.
        plans: {layer that computes in integers: its plan, without the codes of the weight}.
        floats: Layers that are float in the graph.
        clip_codes: As in the runtime.
    """

    inputs: _Inputs
    session: Session
    output: Callable[[list[Tensor]], Any]
    example: dict[str, Tensor]
    graph: OnnxGraph | None
    model: Callable[[], nn.Module | None]
    plans: dict[str, FusedLayer]
    floats: frozenset[str]
    clip_codes: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.inputs.bound(args, kwargs)
        if asked := [name for name in _REFUSED if bound.get(name)]:
            raise HubMPQError(f"{asked[0]}=True is not supported: the runtime returns only the outputs of its example")
        feeds = self.inputs.feeds(bound)
        try:
            found = self.session(feeds)
        except Exception as error:  # each engine raises its own errors for unsupported sizes
            raise HubMPQError(
                f"the engine cannot run inputs {_told(feeds)}: it was built for {_told(self.example)}, where only the "
                "batch size and the number of tokens may change"
            ) from error
        out = self.output(found)
        return out.to_tuple() if bound.get("return_dict") is False and hasattr(out, "to_tuple") else out

    def take_graph(self) -> OnnxGraph:
        """Return the graph; traced again if it was already taken.

        Raises:
            HubMPQError: The model that it was made from no longer exists.
        """
        graph, self.graph = self.graph, None
        if graph is not None:
            return graph
        if (model := self.model()) is None:
            raise HubMPQError("the model that this module was made from no longer exists; keep a reference to it")
        return onnx_graph(model, self.example, self.floats, clip_codes=self.clip_codes)


def network_of(module: nn.Module) -> EngineNetwork:
    """The network behind an engine's module."""
    network: EngineNetwork = module.__dict__[_NETWORK]
    return network


class EngineRuntime(Runtime):
    """A runtime that passes the whole network to an engine for CPUs.

    Attributes:
        clip_codes: How inputs of fewer than 8 bits are represented, see `onnx_graph`.
    """

    clip_codes: ClassVar[bool] = False

    @abstractmethod
    def session(self, graph: OnnxGraph, outputs: tuple[str, ...] = ()) -> tuple[Session, frozenset[str]]:
        """Create a session for a graph.

        Args:
            graph: The graph.
            outputs: Further tensors of the graph to return, after its own outputs.

        Returns:
            (the session, the layers whose calls are all computed in integers).
        """

    @abstractmethod
    def saturates(self) -> bool:
        """Whether the engine adds two products in 16 bits on this CPU."""

    def why_float(self, graph: OnnxGraph, name: str) -> str:
        """Why the engine computes a layer with integer inputs and weights in float."""
        return "the engine runs it in float"

    def available(self) -> str | None:
        return super().available() or missing_packages()

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        return integer_menu(layer, self.saturates())

    def build(self, model: nn.Module, example: Any) -> tuple[nn.Module, RuntimeLayers]:
        if (why := not_on_cpu(model)) is not None:
            raise HubMPQError(f"runtime {self.name!r}: {why}")
        if example is None:
            raise InvalidArgument(f"runtime {self.name!r} requires example=, one batch to trace the model with")
        layers, kept = integer_layers(model)
        for name, layer in layers.items():
            if (why := inexact_sums(layer, self.saturates())) is not None:
                kept[name] = why
        # rows of a table are multiplied by their scales as they are read
        floats = frozenset(name for name in kept if layer_form(model.get_submodule(name)) != "embedding")
        inputs, given = _example(model, example)
        graph = onnx_graph(model, given, floats, clip_codes=self.clip_codes)
        if renamed := given.keys() - {x.name for x in graph.proto.graph.input}:
            raise HubMPQError(f"runtime {self.name!r}: the model returns its input {min(renamed)!r} unchanged")
        session, integer = self.session(graph)
        for name in [name for name in layers if name not in floats | integer]:
            kept[name] = self.why_float(graph, name) if graph.calls.get(name) else "it did not run on the example"
        plans = {name: without_codes(FusedLayer(layer)) for name, layer in layers.items() if name in integer}
        network = EngineNetwork(
            inputs, session, _output(graph), given, graph, weakref.ref(model), plans, floats, self.clip_codes
        )
        built = of_class(model, network, {})
        built.__dict__[_NETWORK] = network
        return built, RuntimeLayers(self.name, tuple(plans), kept)

    def observe(self, module: nn.Module, batch: Any) -> list[LayerRun]:
        """Observe the layers with a second session, which also returns their inputs and outputs.

        The first call uses the module's graph; later calls trace the model again. The products are the same, but where
        a layer's output stays float, the engine may compute the following activations and sums separately.
        """
        network = network_of(module)
        args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
        feeds = network.inputs.feeds(network.inputs.bound(args, kwargs))
        graph = network.take_graph()
        calls = [(plan, call) for name, plan in network.plans.items() for call in graph.calls[name]]
        names = tuple(dict.fromkeys(name for _, call in calls for name in self._observed(call)))
        session, _ = self.session(graph, names)
        found = dict(zip(names, session(feeds)[-len(names) :], strict=True)) if names else {}
        return [self._run(plan, call, *(found[name] for name in self._observed(call))) for plan, call in calls]

    def _observed(self, call: Call) -> tuple[str, str]:
        """Names of the input and output of a call; codes where it makes only codes, so that it stays fused."""
        after = call.requantized
        if self.clip_codes:
            return call.codes, call.output if after is None else after.codes
        return call.values, call.output if after is None else after.values

    def _run(self, plan: FusedLayer, call: Call, x: Tensor, output: Tensor) -> LayerRun:
        plan, after, grid = replace(plan, norm=call.norm), call.requantized, plan.layer.grid
        if after is not None:
            plan.activation = Activation("clip", after.low, after.high)
            plan.output = Grid(after.scale, after.zero_point, 8)
            output = output if self.clip_codes else _codes(output, plan.output)
        return LayerRun(plan, x if self.clip_codes else _codes(x, grid), output)


def _told(feeds: Mapping[str, Tensor]) -> str:
    """Describe inputs in an error message."""
    return ", ".join(f"{k} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for k, x in feeds.items())


def _codes(values: Tensor, grid: Grid) -> Tensor:
    return (values.double() / grid.scale).round().add_(grid.zero_point)


def _example(model: nn.Module, example: Any) -> tuple[_Inputs, dict[str, Tensor]]:
    """(the mapping of arguments to inputs, the inputs of the example, with those that a later call may add)."""
    inputs = _Inputs(inspect.signature(model.forward))
    args, kwargs = ((), example) if isinstance(example, Mapping) else (example, {})
    given = inputs.bound(args, kwargs)
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise HubMPQError(f"{name!r} of the example must be a tensor, got {type(value).__name__}")
    if "input_ids" in given and (config := getattr(model, "config", None)) is not None:
        known = {"attention_mask", *(("token_type_ids",) if hasattr(config, "type_vocab_size") else ())}
        inputs.filled = tuple(sorted(known & inputs.signature.parameters.keys()))
        for name in set(inputs.filled) - given.keys():
            given[name] = _DEFAULTS[name](given["input_ids"])
    inputs.dtypes = {name: value.dtype for name, value in given.items()}
    return inputs, given


def _output(graph: OnnxGraph) -> Callable[[list[Tensor]], Any]:
    """A function from the graph's outputs to the forward's output."""
    structure, leaves = graph.structure, graph.leaves  # no reference to the graph, which holds the weights

    def output(found: list[Tensor]) -> Any:
        tensors = iter(found)
        return tree_unflatten([next(tensors) if leaf is None else leaf[0] for leaf in leaves], structure)

    return output
