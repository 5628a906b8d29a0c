"""Load a packed folder into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapters import build_graph
from ..adapters.base import Source, placed
from ..adapters.bounded import Exceeded, bounded
from ..adapters.example_inputs import example_for
from ..adapters.forward import tensors_of
from ..adapters.module import ModuleLibrary
from ..adapters.restore_state import copied
from ..adapters.transformers import model_class, preprocess_of
from ..core import LayerGraph
from ..core.files import CONFIG, PACKED
from ..core.library import Library, libraries
from ..errors import InvalidArgument, PackedFormat, PolicyMismatch
from ..nn.expose import expose_layers
from ..nn.fold import check_folded
from ..nn.packed import RESIDENT, set_resident
from ..nn.packing import check_tensors, load_quantized
from ..nn.quantize import quantize_to_policy
from ..nn.split_experts import split_experts, split_stacks
from ..pack import Manifest, read_manifest, read_packed, read_shapes
from ..pack.layout import flatten
from .config_numbers import check_numbers
from .remote import repo_of


def load_folder(folder: Path, module: nn.Module | None, kwargs: Mapping[str, Any]) -> tuple[Source, Manifest]:
    """Load a packed folder.

    Args:
        folder: What save_pretrained wrote.
        module: The network, for a model that no library can build; it is copied, not modified.
        kwargs: Arguments of the library's `load`. The model computes in their dtype if they have one, else in the dtype
            that it was saved in.

    Returns:
        The quantized model with its source, and its file's manifest.

    Raises:
        InvalidArgument: `module` is required.
        PackedFormat: The file is damaged, or its library is not registered.
        PolicyMismatch: The file is for another model.
    """
    file, cast = folder / PACKED, not {"dtype", "torch_dtype"}.isdisjoint(kwargs)
    manifest = read_manifest(file)
    graph = manifest.graph
    if module is None:
        library = library_of(manifest, file)
        if not library.builds_from_folder:
            raise InvalidArgument(
                f"{folder} holds a network that no library can build; pass it with from_pretrained(…, module=net)"
            )
        given = {name: value for name, value in kwargs.items() if name != "library"}  # the file says which
        check_folder(folder, given, cast=cast)
        read_packed(file)  # verifies every byte, before memory is allocated for a network
        source = library.rebuild(str(folder), graph, meta=False, **_arguments(library, graph, given))
        example = tensors_of(source.example)
        if kwargs and example and tuple(example[0].shape[1:]) != graph.input_shape:  # the caller gave another one
            graph = graph.counted_on(
                build_graph(source.model, source.example, model_id=graph.model_id, library=graph.library)
            )
            manifest = replace(manifest, graph=graph)
    else:
        source = Source(copied(module), manifest.base_model, manifest.revision, ModuleLibrary.name, (), graph)
    load_packed(file, source.model, cast=cast)
    source.model.eval()
    return replace(source, graph=graph, model_id=manifest.base_model, revision=manifest.revision), manifest


def _arguments(library: Library, graph: LayerGraph, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `rebuild` for a folder; those of the user take precedence."""
    stacks = split_stacks(layer.name for layer in graph if layer.kind.startswith("experts"))
    per_expert = {"per_expert": stacks} if stacks else {}
    return {**library.folder_defaults, **library.example_arguments(graph.input_shape), **given, **per_expert}


def check_folder(folder: Path, given: Mapping[str, Any], *, cast: bool = False) -> None:
    """Refuse a folder whose config.json describes another network than its packed file, before memory is allocated.

    Args:
        folder: The folder; only the header of its packed file is read.
        given: The user's arguments of `rebuild`.
        cast: As in `load_quantized`.

    Raises:
        PackedFormat: File and network have different tensors, or the file does not determine the network.
        PolicyMismatch: The network has other layers.
        HubMPQError: The network cannot be built.
    """
    file, config = folder / PACKED, folder / CONFIG
    tensors, manifest = read_shapes(file)
    library = library_of(manifest, file)
    check_numbers(config, tensors)
    try:
        with bounded(len(flatten(tensors)), file.stat().st_size) as build:
            arguments = _arguments(library, manifest.graph, given)
            skeleton = library.rebuild(str(folder), manifest.graph, meta=True, **arguments).model
            build.check_beside(skeleton)
    except Exceeded as error:
        raise PackedFormat(config, str(error)) from None
    if drawn := build.drawn_outside_state(skeleton):
        raise PackedFormat(config, f"the network initializes {drawn[0]!r} at random, which packed files do not store")
    fit(file, skeleton, manifest)
    check_tensors(file, skeleton, tensors, cast=cast)


def load_resident(folder: Path, resident: str, kwargs: Mapping[str, Any]) -> tuple[Source, Manifest]:
    """Load a packed folder of a transformers model into packed layers, for inference only.

    The float model is never built: memory holds the packed weights.

    Args:
        folder: What save_pretrained wrote.
        resident: "packed" or "float", see `hub_mpq.set_resident`.
        kwargs: Arguments of transformers' from_pretrained, such as dtype.

    Returns:
        The model with its source, and its file's manifest.

    Raises:
        InvalidArgument: The folder belongs to another library.
        PackedFormat: The file is damaged.
    """
    manifest = read_manifest(folder / PACKED)
    library = library_of(manifest, folder / PACKED)
    if not library.pretrained_models:
        raise InvalidArgument(f"resident= is only for transformers models, and {folder} holds a {library.name} model")
    if resident not in RESIDENT:
        raise InvalidArgument(f"resident must be 'packed' or 'float', got {resident!r}")
    import transformers

    check_folder(folder, {})
    safe: Mapping[str, Any] = library.folder_defaults
    config = transformers.AutoConfig.from_pretrained(folder, **safe)
    given = {"dtype": "auto", **safe, **{name: value for name, value in kwargs.items() if name != "library"}}
    model = model_class(config).from_pretrained(folder, **given).eval()
    if resident == "float":
        set_resident(model, resident)
    example = example_for(model, **library.example_arguments(manifest.graph.input_shape))
    published = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    source = Source(
        model,
        manifest.base_model,
        manifest.revision,
        library.name,
        placed(example, model),
        manifest.graph,
        preprocess_of(str(folder), example),
        published,
    )
    return source, manifest


def library_of(manifest: Manifest, file: str | os.PathLike[str]) -> Library:
    """The library that a packed file names.

    Raises:
        PackedFormat: No such library is registered.
    """
    if manifest.library not in libraries:
        known = ", ".join(libraries.names())
        raise PackedFormat(file, f"its library {manifest.library[:40]!r} is unknown; registered libraries: {known}")
    return libraries.get(manifest.library)


def cached_folder(name: str, commit: str | None) -> Path | None:
    """The folder with config.json and packed file of a model; None if that is unknown."""
    from huggingface_hub import try_to_load_from_cache

    if (Path(name) / PACKED).is_file():
        return Path(name)
    if commit is None or repo_of(name) is None:
        return None
    found = try_to_load_from_cache(name, PACKED, revision=commit)
    return Path(found).parent if isinstance(found, str) and (Path(found).parent / CONFIG).is_file() else None


def load_packed(path: str | os.PathLike[str], skeleton: nn.Module, *, cast: bool = False) -> Manifest:
    """Turn a float model (with any weights) into the packed model of a file, in place.

    Args:
        path: The packed file.
        skeleton: The float model.
        cast: Keep the dtypes of `skeleton`; otherwise it takes those of the file.

    Returns:
        The file's manifest.

    Raises:
        PackedFormat: The file is damaged.
        PolicyMismatch: The file is for another model.
    """
    tensors, manifest = read_packed(path)
    fit(path, skeleton, manifest)
    load_quantized(path, skeleton, tensors, cast=cast)
    return manifest


def fit(path: str | os.PathLike[str], skeleton: nn.Module, manifest: Manifest) -> None:
    """Add the quantizers of a packed file to its float model, in place.

    Args:
        path: The packed file, for errors.
        skeleton: The float model.
        manifest: The file's manifest.

    Raises:
        PolicyMismatch: The model has other layers.
        PackedFormat: Its layers share weights differently than the file says.
    """
    expose_layers(skeleton)
    if (why := check_folded(skeleton, manifest.graph.floats)) is not None:
        raise PackedFormat(path, why)
    split_experts(skeleton, split_stacks(manifest.graph.names))
    modules = dict(skeleton.named_modules())
    weights = {n: m.weight for n, m in modules.items() if isinstance(getattr(m, "weight", None), Tensor)}
    graph = manifest.graph
    if wrong := [x.name for x in graph if x.name not in weights or tuple(weights[x.name].shape) != x.weight_shape]:
        raise PolicyMismatch((), wrong)
    holders: dict[int, str] = {}
    for layer in sorted(graph, key=lambda x: x.weight_owner is not None):
        says = layer.weight_owner or layer.name
        if (holder := holders.setdefault(id(weights[layer.name]), layer.name)) != says:
            raise PackedFormat(
                path, f"layer {layer.name!r} shares the weight of {says!r}, but in the network that of {holder!r}"
            )
    quantize_to_policy(skeleton, graph, manifest.policy)
