"""torch's own int8 operators (oneDNN), in this process and without a compiler."""

from __future__ import annotations

import platform
import timeit
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.restore_state import copied_structure
from ..core import LayerBits, LayerSpec, Runtime, RuntimeLayers
from ..errors import HubMPQError
from ..nn.layers import first_operand, replace_layer
from .certificate import LayerRun
from .fused_graph import FusedGraph
from .fused_layer import Activation, FusedLayer
from .integer_layer import Grid, IntegerLayer, inexact_sums, integer_layers, integer_menu
from .rebuilt import not_on_cpu, of_class, run

MAGIC = 1.5 * 2.0**23
"""Added to a small float32 it leaves no bits behind the point, and the integer in the lowest ones."""


class Codes(nn.Module):
    """Float32 to the codes of a grid, uint8, rounded half to even."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.odd = grid.zero_point % 2  # an even number is added before rounding, so that ties go to the same side
        low = MAGIC - self.odd
        self.register_buffer("start", torch.tensor(low + grid.zero_point), persistent=False)
        self.inverse = 1.0 / grid.scale
        self.low, self.high = low, low + grid.top

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.add(self.start, x, alpha=self.inverse).clamp_(self.low, self.high)
        codes = shifted.view(torch.int32).to(torch.uint8)
        return codes.add_(1) if self.odd else codes

    def extra_repr(self) -> str:
        return str(self.grid)


@lru_cache
def saturates() -> bool:
    """Whether this CPU adds two products in 16 bits. Tried out: 255 · 127 twice."""
    x = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    one, zero = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    out = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return float(out[0, 0]) != 64 * 255 * 127


def inexact(layer: IntegerLayer) -> str | None:
    """Why a layer's sums would not be exact here; None when they are."""
    return inexact_sums(layer, saturates())


def _post(activation: Activation | None, output: Grid | None) -> tuple[str, list[Any], str, int | None]:
    """(name, scalars, algorithm) of oneDNN's post-operation, and what codes are cut at afterwards."""
    top = None if output is None or output.bits == 8 else output.top
    name = None if activation is None else activation.name
    if name in ("relu", "clip", None) and (name == "clip" or top is not None):
        low, high = (0.0, float("inf")) if name == "relu" else (-float("inf"), float("inf"))
        if name == "clip":
            low, high = activation.low, activation.high
        if output is not None:
            low = max(low, -output.zero_point * output.scale)
            high = min(high, (output.top - output.zero_point) * output.scale)
        return "hardtanh", [low, high], "", None
    if name == "gelu":
        return "gelu", [], activation.approximate, top
    return {None: "none", "relu": "relu", "hardswish": "hardswish", "silu": "swish"}[name], [], "", top


def _without_codes(plan: FusedLayer) -> FusedLayer:
    """The same plan without the codes of the weight, of which a module has a form of its own."""
    return replace(plan, layer=replace(plan.layer, weight=plan.layer.weight.new_empty(0)))


class OnednnLayer(nn.Module):
    """An integer layer: codes of the input [, summand] to float32 or to codes."""

    def __init__(self, plan: FusedLayer) -> None:
        super().__init__()
        layer = plan.layer
        self.plan, self.shape = _without_codes(plan), layer.weight.shape
        self.name, self.scalars, self.algorithm, self.cut = _post(plan.activation, plan.output)
        self.dtype = torch.float32 if plan.output is None else torch.uint8
        self.out_scale = 1.0 if plan.output is None else plan.output.scale
        self.out_zero = 0 if plan.output is None else plan.output.zero_point
        self.register_buffer("scale", layer.scale, persistent=False)
        self.register_buffer("zero", torch.zeros(len(layer.scale), dtype=torch.int32), persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)
        if layer.convolution:
            self.convolution = [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]
            self.packed = torch.ops.onednn.qconv_prepack(
                layer.weight, layer.scale, layer.grid.scale, layer.grid.zero_point, *self.convolution, list(plan.shape)
            )
        else:
            self.packed = torch.ops.onednn.qlinear_prepack(layer.weight, None)

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        layer = self.plan.layer
        grid = layer.grid
        head = (x, grid.scale, grid.zero_point, self.packed, self.scale, self.zero)
        out = (self.out_scale, self.out_zero, self.dtype)
        if layer.convolution:
            if summand is None:
                y = torch.ops.onednn.qconv2d_pointwise(
                    *head, self.bias, *self.convolution, *out, self.name, self.scalars, self.algorithm
                )
            else:
                summand = summand if self.plan.overwrites else summand.clone()
                summand = summand.contiguous(memory_format=torch.channels_last)
                y = torch.ops.onednn.qconv2d_pointwise.binary(
                    *head, summand, self.bias, *self.convolution, *out, 1.0, 0, "sum", 1.0, self.name, [], ""
                )
        elif summand is None:
            y = torch.ops.onednn.qlinear_pointwise(*head, self.bias, *out, self.name, self.scalars, self.algorithm)
        else:
            y = torch.ops.onednn.qlinear_pointwise.binary(
                *head, summand, self.bias, *out, 1.0, 0, "add", 1.0, self.name, [], ""
            )
        return y if self.cut is None else y.clamp_(max=self.cut)


class FloatLayer(nn.Module):
    """The same layer computed in float32 on its grids: float32 [, summand] to float32."""

    def __init__(self, plan: FusedLayer) -> None:
        super().__init__()
        layer = plan.layer
        self.plan, self.shape = _without_codes(plan), layer.weight.shape
        self.low, self.high = -float(layer.grid.zero_point), float(layer.grid.top - layer.grid.zero_point)
        axes = (-1,) + (1,) * (layer.weight.dim() - 1)
        # the scale of the input is in the weight: the input is integers
        weight = layer.weight.double() * layer.scale.double().view(axes) * layer.grid.scale
        self.register_buffer("weight", weight.float(), persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        layer = self.plan.layer
        x = x.mul(1.0 / layer.grid.scale).round_().clamp_(self.low, self.high)
        if layer.convolution:
            y = F.conv2d(x, self.weight, self.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        else:
            y = F.linear(x, self.weight, self.bias)
        if summand is not None:
            y += summand
        return y if self.plan.activation is None else self.plan.activation(y)


class Exchanged(nn.Module):
    """An integer layer in the place of the layer that it was made from."""

    def __init__(self, layer: nn.Module, codes: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.codes = layer, codes

    @property
    def weight(self) -> Tensor:
        """Stands for the weight of models that look at its type or its shape; it has no values (NaN)."""
        shape: torch.Size = self.layer.shape
        return torch.full((), torch.nan).expand(shape)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_operand(args, kwargs)
        return self.layer(x if self.codes is None else self.codes(x))


class SharedCodes(Codes):
    """Codes of a tensor that several layers read one after another: made once."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._last: tuple[Any, int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.is_inference():  # it does not tell whether it was overwritten
            return super().forward(x)
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version:
            return last[2]
        codes = super().forward(x)
        self._last = (weakref.ref(x), x._version, codes)
        return codes


class _Engine:
    """Fills a fused graph with these modules; measures which layers are faster in float32, one of a kind once."""

    def __init__(self) -> None:
        self.slower: dict[str, tuple[float, float]] = {}
        self._measured: dict[Any, tuple[float, float]] = {}

    def takes(self, plan: FusedLayer, activation: Activation) -> bool:
        if plan.adds:
            return activation.name == "relu"
        return activation.name != "gelu" or not plan.layer.convolution

    def in_integers(self, plan: FusedLayer, coded: bool) -> bool:
        layer = plan.layer
        kind = (tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups)
        key = (*kind, plan.shape, plan.activation and plan.activation.name, coded, plan.output is None)
        if key not in self._measured:
            self._measured[key] = both_ways(plan, coded)
        seconds = self._measured[key]
        if seconds[0] > seconds[1]:
            self.slower[layer.name] = seconds
        return seconds[0] <= seconds[1]

    def told(self) -> dict[str, str]:
        """{layer that computes in float: why}."""
        return {n: f"faster so: {1e3 * b:.3f} against {1e3 * a:.3f} ms" for n, (a, b) in self.slower.items()}

    def layer(self, plan: FusedLayer) -> nn.Module:
        return OnednnLayer(plan)

    def float_layer(self, plan: FusedLayer) -> nn.Module:
        return FloatLayer(plan)

    def codes(self, grid: Grid) -> nn.Module:
        return Codes(grid)


def both_ways(plan: FusedLayer, coded: bool, rounds: int = 7) -> tuple[float, float]:
    """Seconds of a layer at the shape of the example, in integers and in float, each with the conversions of its kind.

    Args:
        plan: The layer.
        coded: Whether its input comes as codes where it computes in integers.
        rounds: The least of so many counts.
    """
    x = torch.rand(plan.shape) * plan.layer.grid.scale * plan.layer.grid.top
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    alone = replace(plan, adds=False)
    codes, layer, plain = Codes(plan.layer.grid), OnednnLayer(alone), FloatLayer(alone)
    after = nn.Identity() if plan.output is None else Codes(plan.output)
    with torch.no_grad():
        given = codes(x)
        ways = (lambda: layer(given if coded else codes(x)), lambda: after(plain(x)))
        for run in ways:
            run()
        found = [[timeit.timeit(run, number=1) for run in ways] for _ in range(rounds)]
    return min(a for a, _ in found), min(b for _, b in found)


class Onednn(Runtime):
    """torch's own int8 operators on an x86 CPU, in this process.

    Convolutions take BatchNorm, activation and residual sum along where torch.fx can trace the network; else each layer
    is exchanged by itself.
    """

    name = "onednn"
    generates: ClassVar[bool] = True

    def available(self) -> str | None:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"its int8 operators are for x86, and this is {platform.machine()}"
        if not torch.backends.mkldnn.is_available():
            return "this build of torch has no oneDNN"
        return None

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        return integer_menu(layer, saturates())

    def portable_menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        return integer_menu(layer, saturates=True)

    def build(self, model: nn.Module, example: Any) -> tuple[nn.Module, RuntimeLayers]:
        if (why := not_on_cpu(model)) is not None:
            raise HubMPQError(f"runtime {self.name!r}: {why}")
        layers, kept = integer_layers(model)
        for name in [n for n, layer in layers.items() if inexact(layer)]:
            kept[name] = inexact(layers.pop(name)) or ""
        engine = _Engine()
        built = None if not isinstance(example, tuple) else _fused(model, layers, example, engine)
        if built is None:
            built = _exchanged(model, layers, example, engine)
        integer = tuple(name for name in layers if name not in engine.slower)
        return built, RuntimeLayers(self.name, integer, kept | engine.told())

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
            elif isinstance(part, OnednnLayer):
                hooks += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
        try:
            run(module, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return runs


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
        plan = FusedLayer(layer, shape=shapes.get(name, ()))
        if not plan.shape or engine.in_integers(plan, False):
            codes = shared.setdefault(layer.grid, SharedCodes(layer.grid))
            replace_layer(net, name, Exchanged(OnednnLayer(plan), codes))
        else:
            replace_layer(net, name, Exchanged(FloatLayer(plan), None))
    return net


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
