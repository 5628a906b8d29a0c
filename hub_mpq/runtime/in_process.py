"""Runtimes that compute in process: integer layers in a fused graph, or replaced one by one in the model."""

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

    If torch.fx can trace the network, BatchNorm, activation and residual sum are fused into the layers; otherwise each
    layer is replaced separately. A layer that is faster in float32 runs in float32.

    Attributes:
        layer_class: Module constructed from a `FusedLayer`. Called with the codes of the input and an optional float32
            residual, it returns float32, or codes if the plan has a grid for its output. Has `plan`, and `shape` of the
            weight.
    """

    layer_class: ClassVar[type[Any]]

    @abstractmethod
    def inexact(self, layer: IntegerLayer) -> str | None:
        """Why a layer's sums would not be exact on this machine; None if they are."""

    @abstractmethod
    def takes(self, plan: FusedLayer, activation: Activation) -> bool:
        """Whether an activation can be fused into a layer."""

    def build(self, model: nn.Module, example: Any) -> tuple[nn.Module, RuntimeLayers]:
        if (why := not_on_cpu(model)) is not None:
            raise HubMPQError(f"runtime {self.name!r}: {why}")
        layers, kept = integer_layers(model)
        engine = _Engine(self)
        built = None if not isinstance(example, tuple) else _fused(model, layers, example, engine)
        if built is None:
            built = _exchanged(model, layers, example, engine)
        weights_on_grid(built)  # of the remaining layers
        made = {part.plan.layer.name for part in built.modules() if isinstance(part, self.layer_class)}
        integer = tuple(name for name in layers if name in made - engine.floats.keys())
        unseen = dict.fromkeys(layers.keys() - made - engine.floats.keys(), "it did not run on the example")
        return built, RuntimeLayers(self.name, integer, kept | engine.floats | unseen)

    def observe(self, module: nn.Module, batch: Any) -> list[LayerRun]:
        runs: list[LayerRun] = []
        sources: dict[int, tuple[Tensor, Tensor]] = {}
        given: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}

        def coded(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            sources[id(out)] = (args[0].clone(), out)  # keeps the output alive, so that its id is not reused

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
    """Makes the modules of a fused graph, and measures which layers are faster in float32, equal layers once.

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
            self.floats[layer.name] = f"float is faster: {1e3 * floats:.3f} ms, integers {1e3 * integers:.3f} ms"
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
        """Time a layer in integers and in float, each with its conversions, at the shape of the example.

        Args:
            plan: The layer.
            coded: Whether its input arrives as codes if it computes in integers.
            rounds: Number of timings, of which the minimum counts.

        Returns:
            (seconds in integers, seconds in float).
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
    """Broadcast input and residual of a layer, which had equal shapes in the example (of one sample, perhaps)."""
    x, summand = args
    plan = layer.plan.layer
    shape = plan.output_shape(x.shape)
    if summand.shape == shape:
        return None
    whole = torch.broadcast_shapes(shape, summand.shape)
    own = 3 if plan.convolution else 1  # axes that an input cannot be repeated along
    if whole[-own:] != shape[-own:]:
        raise HubMPQError(
            f"layer {plan.name!r} cannot add shape {tuple(summand.shape)} to its output of shape {tuple(shape)}; pass "
            "an example of this size to to_runtime"
        )
    return x.expand(*whole[:-own], *x.shape[-own:]), summand.expand(whole).contiguous()


def _fused(
    model: nn.Module, layers: dict[str, IntegerLayer], example: tuple[Any, ...], engine: _Engine
) -> nn.Module | None:
    """The network as a fused graph; None if torch.fx cannot trace it."""
    try:
        graph = FusedGraph(model, layers, example, engine)
    except Exception:  # torch.fx raises errors of various types for a network that it cannot trace
        return None
    built = graph.build()
    return of_class(model, built, {"graph": built})


def _exchanged(model: nn.Module, layers: dict[str, IntegerLayer], example: Any, engine: _Engine) -> nn.Module:
    """Copy a model with integer layers in place of the quantized ones; other weights are shared.

    Args:
        model: The model.
        layers: Its integer layers.
        example: A batch that layers are timed with, to find those that are faster in float; None: all layers compute in
            integers.
        engine: Times the layers and makes the modules.

    Returns:
        The copy.
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
    """A forward hook that frees shared codes: they are shared only within one call."""
    for codes in shared:
        codes.forget()


def _input_shapes(net: nn.Module, layers: Iterable[str], example: Any) -> dict[str, tuple[int, ...]]:
    """{layer: shape of its input at its first call} in one run."""
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
