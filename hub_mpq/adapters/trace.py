"""From one watched forward to the LayerGraph, by exact layer type."""

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
"""Stem and head keep 8 bits (LIMPQ §4.1)."""
EDGE_EMBEDDING = LayerBits(8, 32)


def trace(
    model: nn.Module, example: Example, *, head: Sequence[str] | None = None, exclude: Iterable[str] = ()
) -> tuple[tuple[LayerSpec, ...], tuple[FloatOp, ...]]:
    """Layers in the order they first run, and the work that stays float, from one forward on one sample.

    `example` has a batch axis in front. `head`: names of the classifier's layers or of modules that hold them, ()
    for none; by default the last quantizable layer that runs. `exclude`: glob patterns of layers to leave float.
    The first layer with weights to run (the stem), every embedding, the head and what shares a weight with one of these
    are fixed at 8 bits.
    A layer that runs several times has its MACs and its input features added up.
    Of experts that are layers of their own each gets an equal share of what their stack has, as expected over tokens.
    Layers that share a Parameter get one `tie` and name its first user as `weight_owner`, those that never run
    themselves come last. Linear layers of one
    parent that read the same tensor (q, k, v; gate, up) get one `activation_tie`; any layers that do, one
    `input_owner`.
    The model is left as it was. Raises HubMPQError when the model does not run on the example.
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
        for name, module in modules.items()  # T5's `shared` only lends its Parameter: replaced with the rest
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
    """The LayerGraph of a model; arguments as in `trace`.

    Raises:
        InvalidArgument: The model is quantized already, or one of its tensors has a name that packed files give to a
            part of a layer.
    """
    if found := [name for name, _ in (*quantized_layers(model), *packed_layers(model))]:
        raise InvalidArgument(f"the model is quantized already (layer {found[0]!r}); quantize its float model anew")
    if taken := [key for key in model.state_dict() if key.rpartition(".")[2] in (*WEIGHT_PARTS, *INPUT_PARTS)]:
        raise InvalidArgument(
            f"the model can't have a tensor named {taken[0]!r}: packed files give that name to a part of a quantized "
            "layer; rename it"
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
    """{BatchNorm: layer}: which BatchNorm reads nothing but the whole output of which quantizable layer.

    Views count as the output itself, what an in-place operation has made of it does not. A BatchNorm after a sum,
    a concatenation or an activation, or after different layers in one forward, is left out.
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
    """Whether the input of each named layer goes below zero on a batch; layers that do not run are left out."""
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
    """Give each expert that is a layer of its own, or that has layers of its own, the same share of the calls and
    products of all: which one a token reaches is not known, and on meta tensors one stands for all. Experts that all
    read as much stay as they are."""
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
                    reads=None if tensor is None else (tensor[0], -1 - i, tensor[2]),  # its own rows, those of no other
                )
                for name, i in names.items()
            ]
            run.calls[first:] = each + rest


def _excluded(modules: dict[str, nn.Module], patterns: Iterable[str]) -> set[str]:
    """Names of weighty modules that the patterns match, and of those that share a Parameter with them."""
    layers = [name for name, module in modules.items() if weighty(module)]
    out: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = matching(layers, pattern)
        if not found:
            raise InvalidArgument(f"exclude pattern {pattern!r} matches none of the {len(layers)} layers with weights")
        out.update(found)
    weights = {id(modules[name]._parameters.get("weight")) for name in out} - {id(None)}
    return out | {name for name in layers if id(modules[name]._parameters.get("weight")) in weights}


def _used_outside(modules: dict[str, nn.Module], run: ForwardRecord) -> set[str]:
    """Layers whose weight an operator read while no quantizable layer that holds it ran: it would read the float one.

    A tied head that is no layer (x @ embedding.weight.T), another weight that is made from it, a layer of another type
    that shares it. So would a layer whose kind has its output channels along another axis (a transposed convolution
    tied to an ordinary one): what is packed has the scales of one axis.
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
    """{layer: the first layer that runs with the same Parameter}, for all but that first one."""
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(modules[name].weight), name) for name in names}
    return {name: owner for name, owner in found.items() if owner != name}


def _reads(run: ForwardRecord, names: set[str]) -> dict[str, tuple[object, ...]]:
    """{layer: the tensors it reads, call by call}, in the order they run."""
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
