"""A network as a graph in which what follows an integer layer is fused into it: BatchNorm, activation, residual sum.

The values are those of the separate layers, up to float32 rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from ..adapters.restore_state import copied_structure
from ..nn.multihead_attention import attend
from .fused_layer import Activation, FusedLayer, affine
from .integer_layer import Grid, IntegerLayer

NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)


def _is_norm(module: nn.Module | None) -> bool:
    """Whether a module in evaluation mode is a factor and a summand per channel.

    Subclasses may compute anything, so the only one accepted is timm's BatchNormAct2d, which adds an activation.
    """
    kind = type(module)
    return kind in NORMS or (kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."))


class _Tracer(fx.Tracer):
    """Keeps quantized layers and norms whole."""

    def __init__(self, layers: Mapping[str, IntegerLayer]) -> None:
        super().__init__(autowrap_functions=(attend,), param_shapes_constant=True)
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.layers or _is_norm(m):
            return True
        if any(name.startswith(f"{module_qualified_name}.") for name in self.layers):
            return False
        return type(m).__module__.startswith("hub_mpq.") or super().is_leaf_module(m, module_qualified_name)


def activation_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    """The activation that a node computes, if it can be fused into an integer layer."""
    if node.op == "call_module":
        return _of_module(modules[str(node.target)])
    if node.op == "call_function" and node.target in (F.relu, torch.relu):
        return Activation("relu")
    if node.op == "call_method" and node.target == "relu":
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


_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    F.relu_: F.relu,
    torch.relu_: torch.relu,
    **{getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "sub", "mul", "truediv")},
}


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _nothing(module: nn.Module) -> bool:
    """Whether a module in evaluation mode returns its input."""
    return type(module) is nn.Identity or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training)


def _is_add(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (operator.add, torch.add) and not node.kwargs


class Engine(Protocol):
    """Makes the modules of a fused graph."""

    def takes(self, plan: FusedLayer, activation: Activation) -> bool:
        """Whether an activation can be fused into a layer."""

    def in_integers(self, plan: FusedLayer, coded: bool) -> bool:
        """Whether a layer computes in integers; `coded`: the previous layer already outputs codes."""

    def layer(self, plan: FusedLayer) -> nn.Module:
        """A module called with the codes of the input, and with the residual if there is one."""

    def float_layer(self, plan: FusedLayer) -> nn.Module:
        """The same, called with the input in float32."""

    def codes(self, grid: Grid) -> nn.Module:
        """A module from float32 to codes."""


class _Tensors(fx.Interpreter):
    """Records the shape, dtype and memory of every tensor of a run."""

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(out.shape), out.dtype
        n.meta["memory"] = {x.untyped_storage().data_ptr() for x in tree_leaves(out) if isinstance(x, Tensor)} - {0}
        return out


def _cloned(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """Clone an example, because a network may overwrite its input."""
    return tuple(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, example))


def _equal(one: Any, other: Any) -> bool:
    """Whether two outputs contain the same tensors."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=False)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) or isinstance(b, Tensor)]
    return all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in tensors
    )


class FusedGraph:
    """The graph of a network, before an engine's modules replace the layers.

    Args:
        model: A quantized network in evaluation mode; it is not changed.
        layers: Its integer layers by name.
        example: A batch, as positional arguments.
        engine: Makes the modules of the layers.

    Raises:
        Exception: torch.fx cannot trace the network.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, IntegerLayer], example: tuple[Any, ...], engine: Engine
    ) -> None:
        net = copied_structure(model).eval()
        self.module = fx.GraphModule(net, _Tracer(layers).trace(net))
        self.layers, self.engine = layers, engine
        self.modules = dict(self.module.named_modules())
        self._fresh = {n for n, m in self.modules.items() if type(m) in (nn.ReLU, nn.MaxPool2d) or _is_norm(m)}
        with torch.no_grad():
            want = net(*_cloned(example))
            _Tensors(self.module).run(*_cloned(example))
            self._clean()
            found = _Tensors(self.module).run(*_cloned(example))
        if not _equal(found, want):
            raise NotImplementedError("the traced graph differs from the model, which may branch on a type")
        self.fused: dict[fx.Node, tuple[FusedLayer, fx.Node, fx.Node | None]] = {}
        self._sums: set[fx.Node] = set()
        self._coded: set[fx.Node] = set()
        self._order = {node: i for i, node in enumerate(self.module.graph.nodes)}
        for node in list(self.module.graph.nodes):
            if node.op == "call_module" and node.target in layers:
                self._follow(node)

    def _clean(self) -> None:
        graph = self.module.graph
        self._overwriting = {n for n, m in self.modules.items() if getattr(m, "inplace", False)}
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is torch._assert:
                graph.erase_node(node)
            elif node.op == "call_module" and _nothing(self.modules[node.target]):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            else:
                self._out_of_place(node)
        graph.eliminate_dead_code()

    def _out_of_place(self, node: fx.Node) -> None:
        """Replace an in-place operation; later readers of its input read its output instead."""
        if node.op == "call_module" and node.target in self._overwriting:  # may not be its first call
            self.modules[node.target].inplace = False
        elif node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        elif node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
        elif node.op == "call_method" and str(node.target).endswith("_") and hasattr(Tensor, str(node.target)[:-1]):
            node.target = str(node.target)[:-1]
        elif node.op != "call_module" and (node.target is operator.setitem or _name(node).endswith("_")):
            raise NotImplementedError(f"{_name(node)} overwrites a tensor")
        else:
            return
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        shared = [n for n in order if n not in (node, node.args[0]) and n.meta["memory"] & node.args[0].meta["memory"]]
        if any(order[n] < order[node] < order[user] for n in shared for user in n.users):
            raise NotImplementedError(f"{_name(node)} overwrites a view, or a tensor that has one")
        node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])

    def _follow(self, node: fx.Node) -> None:
        """Fuse what follows a layer into it."""
        name = str(node.target)
        out = FusedLayer(self.layers[name], shape=node.args[0].meta["shape"])
        tail, other = node, None
        while out.activation is None and len(tail.users) == 1:
            user = next(iter(tail.users))
            if (norm := self._norm(user, out)) is not None:
                out.layer, tail = out.layer.times(*affine(norm)), user
                out.norm = str(user.target)
                out.activation = _of_module(norm.act) if hasattr(norm, "act") else None
            elif (act := activation_of(user, self.modules)) is not None and self.engine.takes(out, act):
                out.activation, tail = act, user
            elif not out.adds and _is_add(user) and (other := self._summand(user, tail)) is not None:
                self._sums.add(user)
                out.adds, tail = True, user
                out.overwrites = self._last_reader(other, user)
            else:
                break
        self.fused[node] = (out, tail, other)

    def _norm(self, node: fx.Node, plan: FusedLayer) -> Any:
        """The BatchNorm that a node calls, if it and its activation can be fused into a layer."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if not _is_norm(module) or module.running_mean is None or plan.norm or plan.adds or not plan.layer.convolution:
            return None
        act = getattr(module, "act", None)
        if act is None or _nothing(act):
            return module
        known = _of_module(act)
        return module if known is not None and self.engine.takes(plan, known) else None

    def _summand(self, add: fx.Node, tail: fx.Node) -> fx.Node | None:
        """The other operand of a sum, if it has the same shape and is float32."""
        if len(add.args) != 2 or add in self._sums:  # a sum is fused into only one of two layers
            return None
        left, right = add.args
        other = right if left is tail else left
        if not isinstance(other, fx.Node) or other is tail:
            return None
        same = other.meta.get("shape") == tail.meta.get("shape") and other.meta.get("dtype") == torch.float32
        return other if same else None

    def _last_reader(self, tensor: fx.Node, reader: fx.Node) -> bool:
        """Whether `reader` is the last to read a tensor that belongs to this graph."""
        made = (self.layers.keys() | self._fresh) if tensor.op == "call_module" else ()
        if tensor.target not in made and not _is_add(tensor):
            return False
        return all(self._reads(u) and self._order[u] < self._order[reader] for u in tensor.users if u is not reader)

    def _reads(self, node: fx.Node) -> bool:
        return node.op == "call_module" and node.target in self.layers

    def _readers(self, tensor: fx.Node) -> list[fx.Node] | None:
        """The integer layers that read a tensor; None if something else reads it too."""
        return list(tensor.users) if all(map(self._reads, tensor.users)) else None

    def build(self) -> fx.GraphModule:
        """Replace the layers by the engine's modules, and return the graph."""
        engine = self.engine
        kept = set(self.fused)
        self._set_outputs(kept)
        for node, (plan, _, _) in self.fused.items():
            if not engine.in_integers(plan, self._coded_by(node, kept)):
                kept.discard(node)
        self._set_outputs(kept)
        graph = self.module.graph
        for plan, tail, other in self.fused.values():
            plan.overwrites = plan.overwrites and self._computed_last(tail, other)
        coded: dict[tuple[fx.Node, Grid], fx.Node] = {}
        for node, (plan, tail, other) in self.fused.items():
            source, grid = node.args[0], plan.layer.grid
            if node in kept and source not in self._coded:
                if (source, grid) not in coded:
                    name = self._add("codes", engine.codes(grid))
                    with graph.inserting_after(source):
                        coded[source, grid] = graph.call_module(name, (source,))
                source = coded[source, grid]
            made = engine.layer(plan) if node in kept else engine.float_layer(plan)
            name = self._add(str(node.target).replace(".", "_") + "_fused", made)
            with graph.inserting_before(tail):
                new = graph.call_module(name, (source,) if other is None else (source, other))
            tail.replace_all_uses_with(new)
            if plan.output is not None:
                self._coded.add(new)
            self._renamed(tail, new)
        graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        return self.module

    def _coded_by(self, node: fx.Node, kept: set[fx.Node]) -> bool:
        """Whether the previous layer outputs codes."""
        return any(
            tail is node.args[0] and n in kept and plan.output is not None for n, (plan, tail, _) in self.fused.items()
        )

    def _set_outputs(self, kept: set[fx.Node]) -> None:
        """Let integer layers output codes, if all readers are integer layers with the same input grid."""
        for node, (plan, tail, _) in self.fused.items():
            readers = self._readers(tail)
            plan.output = None
            if node in kept and readers and not plan.adds and kept.issuperset(readers):
                grids = {self.layers[str(r.target)].grid for r in readers}
                plan.output = grids.pop() if len(grids) == 1 else None

    def _computed_last(self, tail: fx.Node, summand: fx.Node | None) -> bool:
        """Whether the other layers that read a summand run earlier; a fused layer runs where its last operation was."""
        readers = () if summand is None else [u for u in summand.users if u in self.fused]
        return all(self._order[self.fused[u][1]] < self._order[tail] for u in readers)

    def _add(self, name: str, module: nn.Module) -> str:
        """Add a module under an unused name, and return it; a layer may run twice."""
        while hasattr(self.module, name := f"{name}_"):
            pass
        self.module.add_submodule(name, module)
        return name

    def _renamed(self, old: fx.Node, new: fx.Node) -> None:
        """Let plans that add `old` add its replacement."""
        for node, (plan, tail, other) in self.fused.items():
            if other is old:
                self.fused[node] = (plan, tail, new)
