"""Build the LayerGraph of a model from one recorded forward, by exact layer type."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core import FloatOp, LayerBits, LayerGraph, LayerKind, LayerSpec, matching
from ..errors import InvalidArgument
from ..nn.expose import layers_in_state
from ..nn.packed import packed_layers
from ..nn.quantize import quantized_layers
from ..nn.routed_experts import routed_experts
from ..nn.split_experts import SplitStack
from ..nn.types import layer_kind
from ..pack.layout import INPUT_PARTS, WEIGHT_PARTS
from .float_ops import float_ops, replaced_parameters, weighty
from .forward import Example, ForwardRecord, call, tensors_of, watched_forward
from .restore_state import state_restored

EDGE = LayerBits(8, 8)
"""Stem and head keep 8 bits, as in LIMPQ (§4.1)."""
EDGE_EMBEDDING = LayerBits(8, 32)


def trace(
    model: nn.Module, example: Example, *, head: Sequence[str] | None = None, exclude: Iterable[str] = ()
) -> tuple[tuple[LayerSpec, ...], tuple[FloatOp, ...]]:
    """Find the layers of a model and the operations that stay float, from one forward on one sample.

    The first layer with weights (the stem), all embeddings, the head, and layers that share a weight with one of these
    are fixed at 8 bits. MACs and input features of a layer that runs several times are added up. Experts that are
    separate layers get equal shares of the cost of their stack, as expected over tokens.

    Layers that share a Parameter get the same `tie` and name its first user as `weight_owner`; layers that never run
    themselves come last. Linear layers with the same parent that read the same tensor (q, k, v; gate, up) get the same
    `activation_tie`; any layers that read the same tensor get the same `input_owner`. The model is not changed.

    Args:
        model: The float model.
        example: One batch: a tensor, a tuple of arguments or a dict of keyword arguments; every tensor starts with a
            batch axis.
        head: Names of the classifier's layers, or of modules that contain them; () for none. None takes the last
            quantizable layer that runs.
        exclude: Glob patterns of layers to leave float.

    Returns:
        The layers in the order in which they first run, and the float operations.

    Raises:
        InvalidArgument: A pattern matches no layer, or the example has no batch axis.
        HubMPQError: The model does not run on the example.

    Example:
        >>> from hub_mpq.adapters import load, trace
        >>> source = load("test_resnet", meta=True)
        >>> layers, floats = trace(source.model, source.example)
        >>> layers[0].name, layers[0].weight_shape, layers[0].macs
        ('conv1.0', (16, 3, 3, 3), 2764800)
    """
    run = watched_forward(model, example)
    _spread_over_experts(model, run)
    modules = dict(model.named_modules())
    excluded = _excluded(modules, exclude)
    outside = _used_outside(modules, run)
    left_out = excluded | outside
    order = list(dict.fromkeys(c.name for c in run.calls if weighty(modules[c.name])))
    names = [name for name in order if layer_kind(modules[name]) and name not in left_out]
    weights = {id(modules[name].weight) for name in names}
    names += [
        name
        for name, module in modules.items()  # T5's `shared` only holds the Parameter; it is replaced with the others
        if layer_kind(module) and name not in order and name not in left_out and id(module.weight) in weights
    ]
    macs: Counter[str] = Counter()
    for (where, _, _), count in run.macs.items():
        macs[where] += count
    features: Counter[str] = Counter()
    for c in run.calls:
        features[c.name] += c.count
    owners = _owners(modules, names)
    shared = set(owners.values())
    kinds = {name: kind for name in names if (kind := layer_kind(modules[name])) is not None}
    ties = _input_ties(run, {name for name, kind in kinds.items() if kind.shares_input})
    fixed = _fixed(kinds, order, head, owners)
    readers = _first_readers(run, {n for n, kind in kinds.items() if not (kind.reads_indices or kind.weight_only)})
    layers = tuple(
        LayerSpec(
            name=name,
            kind=kinds[name].name,
            weight_shape=tuple(modules[name].weight.shape),
            macs=macs[name] // run.batch,
            weight_count=modules[name].weight.numel(),
            activation_count=features[name] // run.batch,
            tie=owners.get(name) or (name if name in shared else None),
            activation_tie=ties.get(name),
            weight_owner=owners.get(name),
            fixed=fixed.get(name),
            input_owner=None if (first := readers.get(name)) in (name, ties.get(name)) else first,
        )
        for name in names
    )
    return layers, float_ops(modules, run, names, excluded, outside)


def build_graph(
    model: nn.Module,
    example: Example,
    *,
    model_id: str,
    revision: str | None = None,
    library: str = "module",
    head: Sequence[str] | None = None,
    exclude: Iterable[str] = (),
) -> LayerGraph:
    """Build the LayerGraph of a model with `trace`.

    Args:
        model: The float model.
        example: One batch, see `trace`.
        model_id: Name or id of the model.
        revision: Commit of its Hub repository, if any.
        library: Name of its library.
        head: Names of the classifier's layers, see `trace`.
        exclude: Glob patterns of layers to leave float.

    Returns:
        The graph.

    Raises:
        InvalidArgument: The model is already quantized, one of its tensors has a name that packed files reserve, or
            `trace` rejects the arguments.
        HubMPQError: The model does not run on the example.

    Example:
        >>> import torch
        >>> from hub_mpq.adapters import build_graph
        >>> with torch.random.fork_rng():
        ...     net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> graph = build_graph(net, torch.zeros(1, 8), model_id="mlp")
        >>> [(layer.name, layer.macs) for layer in graph]
        [('0', 32), ('2', 8)]
    """
    if found := [name for name, _ in (*quantized_layers(model), *packed_layers(model))]:
        raise InvalidArgument(f"the model is already quantized (layer {found[0]!r}); quantize its float model instead")
    if taken := [key for key in model.state_dict() if key.rpartition(".")[2] in (*WEIGHT_PARTS, *INPUT_PARTS)]:
        raise InvalidArgument(
            f"tensor name {taken[0]!r} is reserved for a part of a quantized layer in packed files; rename it"
        )
    layers, floats = trace(model, example, head=head, exclude=exclude)
    first = next(iter(tensors_of(example)), None)
    replaced = replaced_parameters(dict(model.named_modules()), {layer.name for layer in layers})
    named = layers_in_state(model, model.state_dict(keep_vars=True), [layer.name for layer in layers])
    state = {id(t): t for t in named.values() if isinstance(t, torch.Tensor)}
    return LayerGraph(
        model_id=model_id,
        revision=revision,
        library=library,
        input_shape=() if first is None else tuple(first.shape[1:]),
        layers=layers,
        floats=floats,
        other_bytes=sum(t.numel() * t.element_size() for key, t in state.items() if key not in replaced),
    )


def norm_of(model: nn.Module, example: Example) -> dict[str, str]:
    """Find each BatchNorm that reads exactly the output of one quantizable layer.

    Views count as the output itself; results of in-place operations do not. A BatchNorm after a sum, a concatenation or
    an activation, or after different layers in one forward, is omitted.

    Args:
        model: The float model.
        example: One batch, see `trace`.

    Returns:
        `{name of the BatchNorm: name of the layer}`.

    Raises:
        HubMPQError: The model does not run on the example.

    Example:
        >>> from hub_mpq.adapters import load, norm_of
        >>> source = load("test_resnet", meta=True)
        >>> norm_of(source.model, source.example)["bn1"]
        'conv1.6'
    """
    run = watched_forward(model, example)
    modules = dict(model.named_modules())
    writer = {c.writes: c.name for c in run.calls if c.writes and layer_kind(modules[c.name])}
    sources: dict[str, set[str | None]] = defaultdict(set)
    for c in run.calls:
        if isinstance(modules[c.name], _BatchNorm):
            sources[c.name].add(writer.get(c.source) if c.source else None)
    return {norm: only for norm, (only, *more) in sources.items() if only and not more}


def observe_signed(model: nn.Module, names: Iterable[str], batch: Example) -> dict[str, bool]:
    """Check whether the inputs of layers contain negative values on a batch.

    Args:
        model: The model; it is not changed.
        names: Names of the layers.
        batch: One batch, see `trace`.

    Returns:
        `{name: whether a value is below zero}`, without layers that do not run.

    Example:
        >>> import torch
        >>> from hub_mpq.adapters import observe_signed
        >>> with torch.random.fork_rng():
        ...     net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> observe_signed(net, ["0", "2"], -torch.ones(1, 2))
        {'0': True, '2': False}
    """
    signed: dict[str, bool] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: object, kwargs: object) -> None:
            inputs = tensors_of((args, kwargs))
            if inputs:
                signed[name] = signed.get(name, False) or bool((inputs[0] < 0).any())

        return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    with state_restored(model):
        handles = [watch(name) for name in names]
        try:
            call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return signed


def _spread_over_experts(model: nn.Module, run: ForwardRecord) -> None:
    """Give each expert that is a separate layer, or that has separate layers, an equal share of the calls and products
    of all: which expert a token reaches is unknown, and on meta tensors one expert stands for all. Experts that all
    read the same amount are not changed."""
    splits = [
        {i: f"{stack}.{i}" for i, _ in module.named_children()}
        for stack, module in model.named_modules()
        if isinstance(module, SplitStack)
    ]
    for experts in (*splits, *routed_experts(model)):
        names = {name: i for i, name in enumerate(experts.values())}
        calls = [c for c in run.calls if c.name in names]
        read: Counter[str] = Counter()
        for c in calls:
            read[c.name] += c.count
        if len(read) == len(names) and len(set(read.values())) == 1:
            continue

        def share(whole: int, i: int, count: int = len(names)) -> int:
            whole //= run.batch
            return run.batch * (whole * (i + 1) // count - whole * i // count)

        macs = sum(run.macs.pop(key) for key in list(run.macs) if key[0] in names)
        if macs:
            run.macs.update({(name, f"{name}.weight", False): share(macs, i) for name, i in names.items()})
        if calls:
            first, features = run.calls.index(calls[0]), sum(c.count for c in calls)
            rest = [c for c in run.calls[first:] if c.name not in names]
            tensor = calls[0].reads
            each = [
                replace(
                    calls[0],
                    name=name,
                    count=share(features, i),
                    reads=None if tensor is None else (tensor[0], -1 - i, tensor[2]),  # rows of its own
                )
                for name, i in names.items()
            ]
            run.calls[first:] = each + rest


def _excluded(modules: dict[str, nn.Module], patterns: Iterable[str]) -> set[str]:
    """Names of the layers with weights that the patterns match, and of layers that share a Parameter with them."""
    layers = [name for name, module in modules.items() if weighty(module)]
    out: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = matching(layers, pattern)
        if not found:
            raise InvalidArgument(f"exclude: pattern {pattern!r} matches none of the {len(layers)} layers with weights")
        out.update(found)
    weights = {id(modules[name]._parameters.get("weight")) for name in out} - {id(None)}
    return out | {name for name in layers if id(modules[name]._parameters.get("weight")) in weights}


def _used_outside(modules: dict[str, nn.Module], run: ForwardRecord) -> set[str]:
    """Layers whose weight an operator reads while no quantizable layer with that weight runs, and thus would read the
    float weight.

    Examples are a tied head without a layer (x @ embedding.weight.T), another weight that is computed from it, and a
    layer of another type that shares it. Layers that share a weight with output channels along another axis (a
    transposed convolution tied to an ordinary one) count too, because packed weights have scales along one axis only.
    """
    holders: dict[int, set[str]] = defaultdict(set)
    axes: dict[int, set[object]] = defaultdict(set)
    for name, module in modules.items():
        if kind := layer_kind(module):
            holders[id(module.weight)].add(name)
            axes[id(module.weight)].add((kind.channel_axis, kind.row_axes))
    out = {name for weight, names in holders.items() if len(axes[weight]) > 1 for name in names}
    for parts, running in run.uses:
        owners = [(modules[owner], key) for owner, _, key in (part.rpartition(".") for part in parts)]
        mine = {name for owner, key in owners for name in holders.get(id(getattr(owner, key, None)), ())}
        if not mine & set(running):
            out |= mine
    return out


def _owners(modules: dict[str, nn.Module], names: Iterable[str]) -> dict[str, str]:
    """{layer: the first layer that runs with the same Parameter}, without that first one."""
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(modules[name].weight), name) for name in names}
    return {name: owner for name, owner in found.items() if owner != name}


def _reads(run: ForwardRecord, names: set[str]) -> dict[str, tuple[object, ...]]:
    """{layer: the tensors it reads, call by call}, in the order of their runs."""
    reads: dict[str, list[object]] = defaultdict(list)
    for c in run.calls:
        if c.name in names:
            reads[c.name].append(c.reads)
    return {name: tuple(keys) for name, keys in reads.items()}


def _first_readers(run: ForwardRecord, names: set[str]) -> dict[str, str]:
    """{layer: the first layer that reads the same tensors}."""
    first: dict[object, str] = {}
    return {name: first.setdefault(keys, name) for name, keys in _reads(run, names).items()}


def _input_ties(run: ForwardRecord, names: set[str]) -> dict[str, str]:
    groups: dict[object, list[str]] = defaultdict(list)
    for name, keys in _reads(run, names).items():
        # one parent: all cross-attentions of a decoder read the encoder's output, but nothing fuses them
        groups[name.rpartition(".")[0], keys].append(name)
    return {name: group[0] for group in groups.values() if len(group) > 1 for name in group}


def _fixed(
    kinds: dict[str, LayerKind], order: list[str], head: Sequence[str] | None, owners: dict[str, str]
) -> dict[str, LayerBits]:
    fixed = {name: EDGE_EMBEDDING for name, kind in kinds.items() if kind.reads_indices}
    multiply = [name for name in kinds if name not in fixed]
    last = multiply[-1:] if head is None else [n for n in multiply for h in head if f"{n}.".startswith(f"{h}.")]
    edges = [name for name in order[:1] if name in multiply] + last
    shared = {owners.get(name, name) for name in (*fixed, *edges)}
    edges += [name for name in multiply if owners.get(name, name) in shared]
    return {**{name: EDGE.of_weight if kinds[name].weight_only else EDGE for name in edges}, **fixed}
