"""Prepare a transformers model on the meta device for the tensors of a packed file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import FLOAT_BITS, LayerBits, LayerGraph, Policy
from ..errors import PackedFormat, PolicyMismatch
from ..nn.expose import conceal_layers, expose_layers
from ..nn.fold import check_folded, unfold_layers
from ..nn.layers import pad_only, replace_layer
from ..nn.packed import PackedLayer, float_layer, packed_layer, packed_layers
from ..nn.split_experts import split_experts, split_stacks
from ..pack import Manifest, read_packed
from ..pack.layout import INPUT_PARTS, WEIGHT_PARTS, flatten, key
from ..pack.layout import packed_layers as packed_names
from .cached import mended
from .load import library_of


def network_of(model: Any) -> nn.Module:
    """The network whose names a packed file uses: the wrapped one for a timm model, else the model itself."""
    wrapped = getattr(model, "timm_model", None)
    return wrapped if isinstance(wrapped, nn.Module) else model  # type: ignore[no-any-return]


def become_packed(model: Any, file: str, policy: Policy | LayerBits | None, dtype: torch.dtype) -> Manifest:
    """Replace layers of a model by packed ones for the tensors of a file, every byte of which is verified.

    The model may be of another class than the saved one: without its head, or with a new one. The manifest is then that
    of the part that was loaded.

    Args:
        model: A transformers model on the meta device.
        file: The packed file.
        policy: The policy in config.json.
        dtype: Dtype to compute in.

    Returns:
        The manifest.

    Raises:
        PackedFormat: The file is damaged, or config.json contradicts it.
        PolicyMismatch: The file is for another model.
    """
    tensors, manifest = mended(Path(file).parent, lambda: read_packed(file))
    library_of(manifest, file)
    if policy != manifest.policy:
        raise PackedFormat(file, "its policy differs from the one in config.json")
    net = network_of(model)
    expose_layers(net)
    if (why := check_folded(net, manifest.graph.floats)) is not None:
        raise PackedFormat(file, why)
    there = {name for name, module in net.named_modules() if hasattr(module, "weight")}
    split_experts(net, [found for s in split_stacks(manifest.graph.names) if (found := _here(s, there, model))])
    names = _names(manifest.graph.names, net, model)
    guards = {key(name, "weight") for name in packed_names(manifest)}
    flat = {name: tensor for name, tensor in flatten(tensors).items() if name not in guards}
    # transformers would name them in its report
    known = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = known | {rf"(^|\.){re.escape(name)}$" for name in guards}
    for name in sorted(names, key=lambda n: manifest.graph[n].weight_owner is not None):
        _replace_layer(net, names, name, manifest, flat, dtype, file)
    pad_only(net, PackedLayer)
    conceal_layers(net)  # stacks that stay float: transformers loads them as the Parameters that they are
    _check_covered(model, net, flat, manifest, names, file)
    _untie(model, net)
    return _manifest_of(manifest, names, net)


def _names(wanted: Iterable[str], net: nn.Module, model: Any) -> dict[str, str]:
    """{name in the file: name in the network} of existing layers, with or without the base model's prefix."""
    modules = {name for name, module in net.named_modules() if hasattr(module, "weight")}  # timm's no head: Identity
    return {name: found for name in wanted if (found := _here(name, modules, model)) is not None}


def _here(name: str, modules: Iterable[str], model: Any) -> str | None:
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules), None)


def _replace_layer(
    net: nn.Module,
    names: Mapping[str, str],
    name: str,
    manifest: Manifest,
    flat: Mapping[str, Tensor],
    dtype: torch.dtype,
    file: str,
) -> None:
    layer, bits = manifest.graph[name], manifest.policy.bits[name]
    if bits.weight == FLOAT_BITS:
        return
    here = net.get_submodule(names[name])
    if tuple(getattr(here, "weight", torch.empty(0)).shape) != layer.weight_shape:
        raise PolicyMismatch((), [name])
    owner = None
    if layer.weight_owner is not None:
        owner = net.get_submodule(names[layer.weight_owner]) if layer.weight_owner in names else None
        if not isinstance(owner, PackedLayer):
            raise PackedFormat(file, f"layer {name!r} shares the weight of {layer.weight_owner!r}, which is not loaded")
    parts = {p: flat[f"{name}.{p}"].to("meta") for p in (*WEIGHT_PARTS, *INPUT_PARTS) if f"{name}.{p}" in flat}
    replace_layer(net, names[name], packed_layer(here, layer, bits, parts, dtype=dtype, owner=owner))


def _check_covered(
    model: Any, net: nn.Module, flat: Mapping[str, Tensor], manifest: Manifest, names: Mapping[str, str], file: str
) -> None:
    """Raise PackedFormat if transformers would initialize weights at random that the file should hold.

    The saved class must find exactly its tensors. Another class may leave a head unread and initialize a new one
    (transformers reports that), but no tensors of the base model may be left over or missing in a part that exists.
    """
    own = set(net.state_dict())
    found = {key: _here(key, own, model) for key in flat}
    unread = {key for key, here in found.items() if here is None}
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # transformers ties them again
    missing = own - {here for here in found.values() if here is not None} - {k for k, v in tied.items() if v in own}
    saved = "TimmWrapperForImageClassification" if net is not model else type(model).__name__
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or [saved]):
        prefix = f"{model.base_model_prefix}." if net is model and model.base_model_prefix else ""
        whole = not prefix or not hasattr(net, prefix[:-1])  # the base model itself
        inside = missing if whole else {k for k in missing if k.startswith(prefix)}
        left = {k for k in unread if k.startswith(prefix)}
        there = {_part(key, prefix) for key in own - missing}
        missing, unread = {k for k in inside if left or _part(k, prefix) in there}, set()
    if missing or unread:
        raise PackedFormat(
            file,
            f"it does not match {type(model).__name__}: missing tensors {sorted(missing)[:4]}, "
            f"unexpected tensors {sorted(unread)[:4]}",
        )


def _part(key: str, prefix: str) -> str:
    """First name of a key inside the base model."""
    return key.removeprefix(prefix).partition(".")[0]


def _untie(model: Any, net: nn.Module) -> None:
    """A packed head reads the embedding's weight itself; transformers would look for a Parameter to tie."""
    prefix = "" if net is model else "timm_model."
    gone = {f"{prefix}{name}.weight" for name, _ in packed_layers(net)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {k: v for k, v in tied.items() if k not in gone and v not in gone}


def fill_scales(net: nn.Module) -> None:
    """Set the scales of packed embeddings, which no file holds.

    transformers fills these buffers by the type of a module, and does not know the packed one.
    """
    for _, layer in packed_layers(net):
        if (scale := layer._buffers.get("embed_scale")) is not None:
            scale.fill_(layer.scalar_embed_scale)  # type: ignore[arg-type]


def _manifest_of(manifest: Manifest, names: Mapping[str, str], net: nn.Module) -> Manifest:
    """The manifest of what was loaded; the same one if that is everything under its own name."""
    if all(names.get(name) == name for name in manifest.graph.names):
        return manifest
    graph = manifest.graph
    layers = tuple(
        replace(
            layer,
            name=names[layer.name],
            tie=names.get(layer.tie or ""),
            activation_tie=names.get(layer.activation_tie or ""),
            weight_owner=names.get(layer.weight_owner or ""),
            input_owner=names.get(layer.input_owner or ""),
        )
        for layer in graph
        if layer.name in names
    )
    packed = {f"{name}." for name, _ in packed_layers(net)}
    other = [t for k, t in net.state_dict().items() if f"{k.rpartition('.')[0]}." not in packed or k.endswith(".bias")]
    nbytes = sum(t.numel() * t.element_size() for t in other)
    modules = {name for name, _ in net.named_modules()}
    floats = tuple(op for op in graph.floats if op.name in modules)
    graph = LayerGraph(graph.model_id, graph.revision, graph.library, graph.input_shape, layers, floats, nbytes)
    bits = {names[name]: level for name, level in manifest.policy.bits.items() if name in names}
    history = {k: v for k, v in manifest.provenance.items() if k != "metrics"}  # measured on another model
    return replace(manifest, graph=graph, policy=Policy(bits, graph.digest), provenance=history)


def to_float(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed layer by its float form, with dequantized weights, in place; shared weights stay shared."""
    for name, module in sorted(packed_layers(model), key=lambda item: bool(item[1].owner)):
        shared: Any = module.owner[0].weight if module.owner else None  # the owner is float by now
        replace_layer(model, name, float_layer(module, dtype, shared))
    conceal_layers(model)
    unfold_layers(model)
