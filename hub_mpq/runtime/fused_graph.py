"""A network as a graph in which each integer layer takes what follows it along: BatchNorm, activation, residual sum.

Only what is computed anyway moves into a layer; values are those of the layers one by one, up to float32's rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..adapters.restore_state import copied
from .integer_layer import Grid, IntegerLayer

NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
"""Their evaluated form is one factor and one summand a channel; timm's BatchNormAct2d, a subclass, has an activation."""


@dataclass(frozen=True)
class Activation:
    """What an integer layer applies to its output.

    Args:
        name: "relu", "clip", "gelu", "hardswish" or "silu".
        low, high: Of "clip".
        approximate: Of "gelu", as in torch.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    approximate: str = "none"


@dataclass(eq=False)
class FusedLayer:
    """One integer layer with what it takes along.

    Args:
        layer: The layer, a BatchNorm behind it folded in.
        last: Name of the last module whose output is the layer's own, before the residual sum: the layer, its
            BatchNorm, or its activation.
        activation: Applied after the sum, or None.
        adds: Whether a second input is added.
        overwrites: Whether nobody else reads that second input any more.
        output: The grid that every reader of the output has; None: float32.
        shape: Of the input, of the example.
    """

    layer: IntegerLayer
    last: str
    activation: Activation | None = None
    adds: bool = False
    overwrites: bool = False
    output: Grid | None = None
    shape: tuple[int, ...] = ()
    covers: list[str] = field(default_factory=list)


class _Tracer(fx.Tracer):
    """Keeps quantized layers and norms whole."""

    def __init__(self, layers: Mapping[str, IntegerLayer]) -> None:
        super().__init__(param_shapes_constant=True)
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.layers
            or isinstance(m, NORMS)
            or type(m).__module__.startswith("hub_mpq.")
            or super().is_leaf_module(m, module_qualified_name)
        )


def activation_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    """The activation that a node computes, if it is one that integer layers can take along."""
    if node.op == "call_module":
        return _of_module(modules[str(node.target)])
    if node.op == "call_function" and node.target in (F.relu, torch.relu, F.relu_, torch.relu_):
        return Activation("relu")
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return Activation("relu")
    if node.op == "call_function" and node.target is F.gelu:
        return Activation("gelu", approximate=node.kwargs.get("approximate", "none"))
    return None


def _of_module(module: nn.Module) -> Activation | None:
    if type(module) is nn.ReLU:
        return Activation("relu")
    if type(module) in (nn.ReLU6, nn.Hardtanh):
        return Activation("clip", float(module.min_val), float(module.max_val))
    if type(module) is nn.GELU or type(module).__name__ == "GELU":  # timm's class of that name
        return Activation("gelu", approximate=getattr(module, "approximate", "none"))
    if type(module) is nn.Hardswish:
        return Activation("hardswish")
    if type(module) is nn.SiLU:
        return Activation("silu")
    return None


def _nothing(module: nn.Module) -> bool:
    """Whether an evaluated module passes its input through."""
    return type(module) is nn.Identity or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training)


def _is_add(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add) and not node.kwargs


@torch.no_grad()
def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(factor, summand) of each channel of an evaluated BatchNorm."""
    rstd = (norm.running_var.double() + norm.eps).rsqrt()
    factor = rstd if norm.weight is None else norm.weight.double() * rstd
    shift = -norm.running_mean.double() * factor
    return factor.float(), (shift if norm.bias is None else norm.bias.double() + shift).float()


Maker = Callable[[FusedLayer], nn.Module]


class _Shapes(fx.Interpreter):
    """Notes the shape and dtype of every tensor of a run."""

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(out.shape), out.dtype
        return out


class FusedGraph:
    """The graph of one network, before an engine fills it.

    Args:
        model: A quantized network in eval mode; it stays as it is.
        layers: Its integer layers by name.
        example: A batch, as positional arguments.

    Raises:
        Exception: torch.fx cannot trace the network.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, IntegerLayer], example: tuple[Any, ...]) -> None:
        net = copied(model).eval()
        self.module = fx.GraphModule(net, _Tracer(layers).trace(net))
        self.layers = layers
        self.modules = dict(self.module.named_modules())
        self._clean()
        with torch.no_grad():
            _Shapes(self.module).run(*example)
        self.fused: dict[fx.Node, tuple[FusedLayer, fx.Node, fx.Node | None]] = {}
        self._sums: set[fx.Node] = set()
        self._order = {node: i for i, node in enumerate(self.module.graph.nodes)}
        for node in list(self.module.graph.nodes):
            if node.op == "call_module" and node.target in layers:
                self._follow(node)

    def _clean(self) -> None:
        graph = self.module.graph
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is torch._assert:
                graph.erase_node(node)
            elif node.op == "call_module" and _nothing(self.modules[node.target]):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.eliminate_dead_code()

    def _follow(self, node: fx.Node) -> None:
        """Take along what follows a layer."""
        name = str(node.target)
        out = FusedLayer(self.layers[name], name, shape=node.args[0].meta["shape"], covers=[name])
        tail, other = node, None
        while out.activation is None and len(tail.users) == 1:
            user = next(iter(tail.users))
            norm = self.modules[str(user.target)] if user.op == "call_module" else None
            if isinstance(norm, NORMS) and not out.adds and norm.running_mean is not None and out.layer.convolution:
                out.layer = out.layer.times(*affine(norm))
                out.last = str(user.target)
                out.covers.append(out.last)
                tail = user
                act = getattr(norm, "act", None)
                if act is not None and not _nothing(act):
                    out.activation = _of_module(act)
                    if out.activation is None:  # an activation of its own: undo, the norm stays
                        return self._follow_plain(node)
            elif (act := activation_of(user, self.modules)) is not None and not (out.adds and act.name != "relu"):
                out.activation, tail = act, user
            elif _is_add(user) and other is None and (other := self._summand(user, tail)) is not None:
                self._sums.add(user)
                out.adds, tail = True, user
                out.overwrites = self._last_reader(other, user)
            else:
                break
        self.fused[node] = (out, tail, other)

    def _follow_plain(self, node: fx.Node) -> None:
        name = str(node.target)
        self.fused[node] = (FusedLayer(self.layers[name], name, shape=node.args[0].meta["shape"], covers=[name]), node, None)

    def _summand(self, add: fx.Node, tail: fx.Node) -> fx.Node | None:
        """The other operand of a sum, where it has the same shape and is float32."""
        if len(add.args) != 2 or add in self._sums:  # one layer takes a sum along, not both
            return None
        left, right = add.args
        other = right if left is tail else left
        if not isinstance(other, fx.Node) or other is tail:
            return None
        same = other.meta.get("shape") == tail.meta.get("shape") and other.meta.get("dtype") == torch.float32
        return other if same else None

    def _last_reader(self, tensor: fx.Node, reader: fx.Node) -> bool:
        """Whether a tensor that somebody made for this graph is read for the last time by `reader`."""
        made = tensor.op == "call_module" and (tensor.target in self.layers or isinstance(self.modules[str(tensor.target)], (nn.ReLU, nn.MaxPool2d, *NORMS)))
        made = made or _is_add(tensor)
        others = [u for u in tensor.users if u is not reader]
        return made and all(u.op == "call_module" and u.target in self.layers and self._order[u] < self._order[reader] for u in others)

    def _readers(self, tensor: fx.Node) -> list[fx.Node] | None:
        """The integer layers that read a tensor; None when something else reads it too."""
        users = list(tensor.users)
        return users if all(u.op == "call_module" and u.target in self.layers for u in users) else None

    def output_grids(self, wanted: Callable[[FusedLayer], bool]) -> None:
        """Let layers put out codes where all readers are integer layers of one grid.

        Args:
            wanted: Whether a layer computes in integers here.
        """
        kept = {node: plan for node, plan in self.fused.items() if wanted(plan[0])}
        for plan, tail, _ in kept.values():
            readers = self._readers(tail)
            if plan.adds or not readers or any(r not in kept for r in readers):
                continue
            grids = {self.layers[str(r.target)].grid for r in readers}
            if len(grids) == 1:
                plan.output = grids.pop()

    def build(self, engine: Any) -> fx.GraphModule:
        """The graph with the engine's modules in place of the layers.

        Args:
            engine: Has `layer(FusedLayer)`, a module called on the input's codes and the summand if there is one; and
                `codes(Grid)`, a module from float32 to codes.
        """
        graph = self.module.graph
        coded: set[fx.Node] = set()
        made: dict[fx.Node, fx.Node] = {}
        cache: dict[tuple[fx.Node, Grid], fx.Node] = {}
        for node, (plan, tail, other) in self.fused.items():
            name = str(node.target)
            source = node.args[0]
            source = made.get(source, source)
            if source not in coded:
                source = self._codes(source, plan.layer.grid, engine, cache)
            self.module.add_submodule(f"{name}_integer", engine.layer(plan))
            with graph.inserting_before(tail if tail is not node else node):
                args = (source,) if other is None else (source, made.get(other, other))
                new = graph.call_module(f"{name}_integer", args)
            tail.replace_all_uses_with(new)
            made[tail] = new
            if plan.output is not None:
                coded.add(new)
        graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        return self.module

    def _codes(self, source: fx.Node, grid: Grid, engine: Any, cache: dict[tuple[fx.Node, Grid], fx.Node]) -> fx.Node:
        """The codes of a tensor, made once for all its readers."""
        if (source, grid) not in cache:
            name = f"codes_{len(cache)}"
            self.module.add_submodule(name, engine.codes(grid))
            with self.module.graph.inserting_after(source):
                cache[source, grid] = self.module.graph.call_module(name, (source,))
        return cache[source, grid]
