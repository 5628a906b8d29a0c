"""Runtimes that compute in this process: integer layers in a graph, or one by one in the model as it is."""

from __future__ import annotations

import timeit
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.restore_state import copied_structure
from ..core import Runtime, RuntimeLayers
from ..errors import HubMPQError
from ..nn.layers import first_operand, replace_layer
from .certificate import LayerRun
from .exchanged import Codes, Exchanged, FloatLayer, SharedCodes
from .fused_graph import FusedGraph
from .fused_layer import Activation, FusedLayer
from .integer_layer import Grid, IntegerLayer, integer_layers
from .rebuilt import not_on_cpu, of_class, run, weights_on_grid


class InProcess(Runtime):
    """A runtime with a module for each integer layer.

    Convolutions take BatchNorm, activation and residual sum along where torch.fx can trace the network; else each layer
    is exchanged by itself. A layer that is faster in float32 computes so.

    Attributes:
        layer_class: Made of a `FusedLayer`; called on the codes of the input [and a float32 summand], it gives float32,
            or codes where the plan has a grid for its output. Has `plan` and `shape`, that of the weight.
    """

    layer_class: ClassVar[type[Any]]

    @abstractmethod
    def inexact(self, layer: IntegerLayer) -> str | None:
        """Why a layer's sums would not be exact here; None when they are."""

    @abstractmethod
    def takes(self, plan: FusedLayer, activation: Activation) -> bool:
        """Whether a layer can take an activation along."""

    def build(self, model: nn.Module, example: Any) -> tuple[nn.Module, RuntimeLayers]:
        if (why := not_on_cpu(model)) is not None:
            raise HubMPQError(f"runtime {self.name!r}: {why}")
        layers, kept = integer_layers(model)
        engine = _Engine(self)
        built = None if not isinstance(example, tuple) else _fused(model, layers, example, engine)
        if built is None:
            built = _exchanged(model, layers, example, engine)
        weights_on_grid(built)  # of the layers that are left
        made = {part.plan.layer.name for part in built.modules() if isinstance(part, self.layer_class)}
        integer = tuple(name for name in layers if name in made - engine.floats.keys())
        unseen = dict.fromkeys(layers.keys() - made - engine.floats.keys(), "it did not run on the example")
        return built, RuntimeLayers(self.name, integer, kept | engine.floats | unseen)

    def observe(self, module: nn.Module, batch: Any) -> list[LayerRun]:
        runs: list[LayerRun] = []
        sources: dict[int, tuple[Tensor, Tensor]] = {}
        given: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}

        def coded(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            sources[id(out)] = (args[0].clone(), out)  # the output is held so that its id stays its own

        def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
            given[layer] = (args[0], args[1].clone() if len(args) > 1 else None)  # a summand may be overwritten

        def after(layer: Any, args: tuple[Any, ...], out: Tensor) -> None:
            codes, summand = given.pop(layer)
            source = sources.get(id(codes), (None,))[0]
            runs.append(LayerRun(layer.plan, codes, out.clone(), summand, source))

        hooks = []
        for part in module.modules():
            if isinstance(part, Codes):
                hooks.append(part.register_forward_hook(coded))
            elif isinstance(part, self.layer_class):
                hooks += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
        try:
            run(module, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return runs


class _Engine:
    """Fills a fused graph with a runtime's modules; measures which layers are faster in float32, one of a kind once.

    Attributes:
        floats: {layer that computes in float: why}.
    """

    def __init__(self, runtime: InProcess) -> None:
        self.runtime = runtime
        self.floats: dict[str, str] = {}
        self._measured: dict[Any, tuple[float, float]] = {}

    def takes(self, plan: FusedLayer, activation: Activation) -> bool:
        return self.runtime.takes(plan, activation)

    def in_integers(self, plan: FusedLayer, coded: bool) -> bool:
        layer = plan.layer
        if (why := self.runtime.inexact(layer)) is not None:
            self.floats[layer.name] = why
            return False
        if not plan.shape:
            return True
        kind = (tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups)
        widths = (layer.weight_bits, layer.grid.bits)
        key = (*kind, *widths, plan.shape, plan.activation and plan.activation.name, coded, plan.output is None)
        if key not in self._measured:
            self._measured[key] = self._both_ways(plan, coded)
        integers, floats = self._measured[key]
        if integers > floats:
            self.floats[layer.name] = f"faster so: {1e3 * floats:.3f} against {1e3 * integers:.3f} ms"
        return integers <= floats

    def layer(self, plan: FusedLayer) -> nn.Module:
        made: nn.Module = self.runtime.layer_class(plan)
        if plan.adds:
            made.register_forward_pre_hook(_of_one_shape)
        return made

    def float_layer(self, plan: FusedLayer) -> nn.Module:
        return FloatLayer(plan)

    def codes(self, grid: Grid) -> nn.Module:
        return Codes(grid)

    def _both_ways(self, plan: FusedLayer, coded: bool, rounds: int = 7) -> tuple[float, float]:
        """Seconds of a layer at the shape of the example, in integers and in float, each with the conversions of its
        kind.

        Args:
            plan: The layer.
            coded: Whether its input comes as codes where it computes in integers.
            rounds: The least of so many counts.
        """
        x = (
            torch.rand(plan.shape, generator=torch.Generator().manual_seed(0))
            * plan.layer.grid.scale
            * plan.layer.grid.top
        )
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        alone = replace(plan, adds=False)
        codes, layer, plain = Codes(plan.layer.grid), self.layer(alone), FloatLayer(alone)
        after = nn.Identity() if plan.output is None else Codes(plan.output)
        with torch.no_grad():
            given = codes(x)
            ways = (lambda: layer(given if coded else codes(x)), lambda: after(plain(x)))
            for way in ways:
                way()
            found = [[timeit.timeit(way, number=1) for way in ways] for _ in range(rounds)]
        return min(a for a, _ in found), min(b for _, b in found)


def _of_one_shape(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Input and summand of a layer whose sum broadcasts: they had one shape in the example, of one sample perhaps."""
    x, summand = args
    plan = layer.plan.layer
    shape = plan.output_shape(x.shape)
    if summand.shape == shape:
        return None
    whole = torch.broadcast_shapes(shape, summand.shape)
    own = 3 if plan.convolution else 1  # axes that no input can be repeated along
    if whole[-own:] != shape[-own:]:
        raise HubMPQError(
            f"layer {plan.name!r} adds {tuple(summand.shape)} to its output, {tuple(shape)}; give an "
            "example of this size"
        )
    return x.expand(*whole[:-own], *x.shape[-own:]), summand.expand(whole).contiguous()


def _fused(
    model: nn.Module, layers: dict[str, IntegerLayer], example: tuple[Any, ...], engine: _Engine
) -> nn.Module | None:
    """The network as one graph; None where torch.fx cannot trace it."""
    try:
        graph = FusedGraph(model, layers, example, engine)
    except Exception:  # what torch.fx raises for a network that it cannot trace is of no one type
        return None
    built = graph.build()
    return of_class(model, built, {"graph": built})


def _exchanged(model: nn.Module, layers: dict[str, IntegerLayer], example: Any, engine: _Engine) -> nn.Module:
    """A copy of a model with integer layers in place of the quantized ones; other weights are shared.

    Args:
        model: The model.
        layers: Its integer layers.
        example: A batch, by which layers that are faster in float are found; None: all compute in integers.
        engine: What measures.
    """
    net = copied_structure(model).eval()
    shapes = {} if example is None else _input_shapes(net, layers, example)
    shared: dict[Grid, SharedCodes] = {}
    for name, layer in layers.items():
        if example is not None and name not in shapes:
            continue
        plan = FusedLayer(layer, shape=shapes.get(name, ()))
        if engine.in_integers(plan, False):
            codes = shared.setdefault(layer.grid, SharedCodes(layer.grid))
            new = Exchanged(engine.layer(plan), codes)
        else:
            new = Exchanged(engine.float_layer(plan), None)
        new.describe(net.get_submodule(name))
        replace_layer(net, name, new)
    net.register_forward_hook(partial(_forget, tuple(shared.values())), always_call=True)
    return net


def _forget(shared: Iterable[SharedCodes], *_: Any) -> None:
    """A forward hook: codes are shared within one call."""
    for codes in shared:
        codes.forget()


def _input_shapes(net: nn.Module, layers: Iterable[str], example: Any) -> dict[str, tuple[int, ...]]:
    """{layer: shape of its first input} in one run."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(name, tuple(first_operand(args, kwargs).shape))

        return hook

    modules = dict(net.named_modules(remove_duplicate=False))
    hooks = [modules[name].register_forward_pre_hook(note(name), with_kwargs=True) for name in layers]
    try:
        with torch.no_grad():
            run(net, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found
