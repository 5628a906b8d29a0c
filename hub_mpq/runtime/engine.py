"""What the runtimes have in common that hand the whole network to an engine, as an ONNX graph."""

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
"""Runs a graph: its inputs by name to its outputs."""

_DEFAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": torch.ones_like,
    "token_type_ids": torch.zeros_like,
}
"""What a transformers model takes for an input that is not given."""
_NETWORK = "engine_network"
_REFUSED = ("output_attentions", "output_hidden_states")
_IGNORED = ("return_dict", "use_cache", *_REFUSED)
"""Arguments that are no tensors and change no number."""


@dataclass(eq=False)
class _Inputs:
    """The arguments of a forward as inputs of a graph.

    Args:
        signature: Of the forward.
        dtypes: {input of the graph: its type}.
        filled: The inputs that a call may leave out, see `_DEFAULTS`.
    """

    signature: inspect.Signature
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    filled: tuple[str, ...] = ()

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """{parameter: what is given for it}, without None."""
        found = dict(self.signature.bind(*args, **kwargs).arguments)
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                found |= found.pop(parameter.name, {})
        return {name: value for name, value in found.items() if value is not None}

    def feeds(self, bound: Mapping[str, Any]) -> dict[str, Tensor]:
        """The graph's inputs.

        Raises:
            HubMPQError: The graph, which was traced with an example, computes something else than what is asked for.
        """
        given = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
        if unknown := [name for name in given if name not in self.dtypes]:
            raise HubMPQError(f"{unknown[0]!r} was not in the example that this runtime was built for")
        for name in self.filled:
            if name not in given and "input_ids" in given:
                given[name] = _DEFAULTS[name](given["input_ids"])
        if missing := [name for name in self.dtypes if name not in given]:
            raise HubMPQError(f"{missing[0]!r} is missing: it was in the example that this runtime was built for")
        for name, value in bound.items():
            if name not in given and not self._as_traced(name, value):
                raise HubMPQError(
                    f"{name}={value!r:.40} was not in the example that this runtime was built for, and that takes "
                    "tensors only"
                )
        return {name: self._typed(name, value) for name, value in given.items()}

    def _as_traced(self, name: str, value: Any) -> bool:
        """Whether an argument that is no tensor says what the graph does without it."""
        if name in _IGNORED:
            return True
        default = self.signature.parameters[name].default if name in self.signature.parameters else None
        return type(value) is type(default) and bool(value == default)

    def _typed(self, name: str, value: Tensor) -> Tensor:
        """A whole number or a mask in the type of the example; other types are the engine's to refuse."""
        dtype = self.dtypes[name]
        return value if value.is_floating_point() or dtype.is_floating_point else value.to(dtype)


@dataclass(eq=False)
class EngineNetwork:
    """The forward of a model, computed by an engine; threads may call it.

    Args:
        inputs: What the arguments are to the graph.
        session: What runs it.
        output: What makes the forward's output of the graph's.
        example: Inputs that the graph is traced with.
        graph: The graph, until it was used once more: it holds all weights a second time.
        model: The model that it was made from, as long as it is there.
        plans: {layer that computes in integers: it, without the codes of its weight}.
        floats: The layers that the graph has in float.
        clip_codes: As of the runtime.
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
            raise HubMPQError(f"this runtime returns the outputs of its example; {asked[0]}=True is not among them")
        feeds = self.inputs.feeds(bound)
        try:
            found = self.session(feeds)
        except Exception as error:  # each engine has errors of its own for what its graph has no room for
            raise HubMPQError(
                f"the engine cannot compute {_told(feeds)}: this runtime was built for {_told(self.example)}, of which "
                "only the batch and the number of tokens may change"
            ) from error
        out = self.output(found)
        return out.to_tuple() if bound.get("return_dict") is False and hasattr(out, "to_tuple") else out

    def take_graph(self) -> OnnxGraph:
        """The graph, traced anew where it was taken before.

        Raises:
            HubMPQError: The model that it was made from is gone.
        """
        graph, self.graph = self.graph, None
        if graph is not None:
            return graph
        if (model := self.model()) is None:
            raise HubMPQError("the model that this one was made from is gone, and its graph with it")
        return onnx_graph(model, self.example, self.floats, clip_codes=self.clip_codes)


def network_of(module: nn.Module) -> EngineNetwork:
    """What an engine's module computes by."""
    network: EngineNetwork = module.__dict__[_NETWORK]
    return network


class EngineRuntime(Runtime):
    """A runtime that hands the whole network to an engine for CPUs.

    Attributes:
        clip_codes: How it is given inputs of fewer than 8 bits, see `onnx_graph`.
    """

    clip_codes: ClassVar[bool] = False

    @abstractmethod
    def session(self, graph: OnnxGraph, outputs: tuple[str, ...] = ()) -> tuple[Session, frozenset[str]]:
        """What runs a graph.

        Args:
            graph: The graph.
            outputs: Further tensors of it to return, behind its own outputs.

        Returns:
            (it, the layers all of whose calls it computes in integers).
        """

    @abstractmethod
    def saturates(self) -> bool:
        """Whether the engine adds two products in 16 bits on this CPU."""

    def why_float(self, graph: OnnxGraph, name: str) -> str:
        """Why the engine computes a layer with integer inputs and weights in float."""
        return "the engine computes it in float"

    def available(self) -> str | None:
        return super().available() or missing_packages()

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        return integer_menu(layer, self.saturates())

    def build(self, model: nn.Module, example: Any) -> tuple[nn.Module, RuntimeLayers]:
        if (why := not_on_cpu(model)) is not None:
            raise HubMPQError(f"runtime {self.name!r}: {why}")
        if example is None:
            raise InvalidArgument(f"runtime {self.name!r} traces the model: give example=, one batch")
        layers, kept = integer_layers(model)
        for name, layer in layers.items():
            if (why := inexact_sums(layer, self.saturates())) is not None:
                kept[name] = why
        # rows of a table are multiplied by their scales as they are read
        floats = frozenset(name for name in kept if layer_form(model.get_submodule(name)) != "embedding")
        inputs, given = _example(model, example)
        graph = onnx_graph(model, given, floats, clip_codes=self.clip_codes)
        if renamed := given.keys() - {x.name for x in graph.proto.graph.input}:
            raise HubMPQError(f"runtime {self.name!r}: the model returns its input {min(renamed)!r} as it is")
        session, integer = self.session(graph)
        for name in [name for name in layers if name not in floats | integer]:
            kept[name] = self.why_float(graph, name) if graph.calls.get(name) else "it was not called"
        plans = {name: without_codes(FusedLayer(layer)) for name, layer in layers.items() if name in integer}
        network = EngineNetwork(
            inputs, session, _output(graph), given, graph, weakref.ref(model), plans, floats, self.clip_codes
        )
        built = of_class(model, network, {})
        built.__dict__[_NETWORK] = network
        return built, RuntimeLayers(self.name, tuple(plans), kept)

    def observe(self, module: nn.Module, batch: Any) -> list[LayerRun]:
        """As the interface says, by a second session with the layers' inputs and outputs as further outputs.

        Its graph is that of the module the first time, afterwards the model is traced anew. The products are the same;
        where a layer's output stays float, the engine may compute activations and sums behind it apart.
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
        """Names of the input and the output of a call: codes where it makes nothing else, so that it stays fused."""
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
    """Inputs in words."""
    return ", ".join(f"{k} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for k, x in feeds.items())


def _codes(values: Tensor, grid: Grid) -> Tensor:
    return (values.double() / grid.scale).round().add_(grid.zero_point)


def _example(model: nn.Module, example: Any) -> tuple[_Inputs, dict[str, Tensor]]:
    """(how arguments become inputs, the inputs of the example, with those that a later call may have)."""
    inputs = _Inputs(inspect.signature(model.forward))
    args, kwargs = ((), example) if isinstance(example, Mapping) else (example, {})
    given = inputs.bound(args, kwargs)
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise HubMPQError(f"{name!r} of the example is a {type(value).__name__}, and engines take tensors only")
    if "input_ids" in given and (config := getattr(model, "config", None)) is not None:
        known = {"attention_mask", *(("token_type_ids",) if hasattr(config, "type_vocab_size") else ())}
        inputs.filled = tuple(sorted(known & inputs.signature.parameters.keys()))
        for name in set(inputs.filled) - given.keys():
            given[name] = _DEFAULTS[name](given["input_ids"])
    inputs.dtypes = {name: value.dtype for name, value in given.items()}
    return inputs, given


def _output(graph: OnnxGraph) -> Callable[[list[Tensor]], Any]:
    """What makes the output of the forward of the graph's outputs."""
    structure, leaves = graph.structure, graph.leaves  # not the graph, which holds the weights

    def output(found: list[Tensor]) -> Any:
        tensors = iter(found)
        return tree_unflatten([next(tensors) if leaf is None else leaf[0] for leaf in leaves], structure)

    return output
