"""From a packed folder to the model that runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import adapters
from ..adapters.base import Source, placed
from ..adapters.example_inputs import example_for
from ..adapters.module import ModuleLibrary
from ..adapters.restore_state import copied
from ..adapters.transformers import model_class, preprocess_of
from ..core.files import CONFIG, PACKED
from ..core.library import Library, libraries
from ..errors import HubMPQError, InvalidArgument, PackedFormat, PolicyMismatch
from ..nn.experts import expose_experts
from ..nn.packed import RESIDENT, set_resident
from ..nn.packing import load_quantized
from ..nn.quantize import quantize_to_policy
from ..nn.split_experts import split_experts, split_stacks
from ..pack import Manifest, read_manifest, read_packed


def load_folder(folder: Path, module: nn.Module | None, kwargs: Mapping[str, Any]) -> tuple[Source, Manifest]:
    """Load a packed folder.

    Args:
        folder: What save_pretrained wrote.
        module: The network for a model that no library can build; it is copied, not changed.
        kwargs: Arguments of the library's `load`. With a dtype the model computes in it, else in what it was saved in.

    Returns:
        The quantized model with where it comes from, and what its file says.

    Raises:
        InvalidArgument: The network is needed.
        PackedFormat: The file is bad, or of a library that is not registered.
        PolicyMismatch: The file is for another model.
    """
    manifest = read_manifest(folder / PACKED)
    if module is None:
        library = library_of(manifest, folder / PACKED)
        if not library.builds_from_folder:
            raise InvalidArgument(
                f"{folder} holds a network that no hub can build; pass it: from_pretrained(…, module=net)"
            )
        given = {name: value for name, value in kwargs.items() if name != "library"}  # the file says which
        given = {**library.folder_defaults, **library.example_arguments(manifest.graph.input_shape), **given}
        _check_config(folder, manifest, given)
        if stacks := split_stacks(layer.name for layer in manifest.graph if layer.kind.startswith("experts")):
            given["per_expert"] = stacks
        source = adapters.load(str(folder), pretrained=False, library=library.name, **given)
    else:
        net = copied(module)
        source = Source(net, manifest.base_model, manifest.revision, ModuleLibrary.name, (), manifest.graph)
    load_packed(folder / PACKED, source.model, cast=not {"dtype", "torch_dtype"}.isdisjoint(kwargs))
    source.model.eval()
    graph = manifest.graph
    if kwargs and source.graph.input_shape != graph.input_shape:  # the caller gave another one
        graph = graph.counted_on(source.graph)
        manifest = replace(manifest, graph=graph)
    return replace(source, graph=graph, model_id=manifest.base_model, revision=manifest.revision), manifest


def load_resident(folder: Path, resident: str, kwargs: Mapping[str, Any]) -> tuple[Source, Manifest]:
    """Load a packed folder of a model of transformers into packed layers, which run but are not trained.

    The float model is never built: memory holds the packed weights.

    Args:
        folder: What save_pretrained wrote.
        resident: As in `hub_mpq.nn.packed.set_resident`.
        kwargs: Arguments of transformers' from_pretrained, such as dtype.

    Returns:
        The model with where it comes from, and what its file says.

    Raises:
        InvalidArgument: The folder is of another library.
        PackedFormat: The file is bad.
    """
    manifest = read_manifest(folder / PACKED)
    library = library_of(manifest, folder / PACKED)
    if not library.pretrained_models:
        raise InvalidArgument(f"resident= is for models of transformers, and {folder} holds one of {library.name}")
    if resident not in RESIDENT:
        raise InvalidArgument(f"resident is 'packed' or 'float', not {resident!r}")
    import transformers

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
        raise PackedFormat(file, f"its library {manifest.library[:40]!r} is not registered; known: {known}")
    return libraries.get(manifest.library)


def _check_config(folder: Path, manifest: Manifest, kwargs: Mapping[str, Any]) -> None:
    """PackedFormat when config.json builds a much larger model than the packed file holds, before memory is taken."""
    try:
        skeleton = adapters.load(str(folder), pretrained=False, library=manifest.library, meta=True, **kwargs).model
    except HubMPQError:
        return  # whatever is wrong, building it says so too
    built = sum(t.numel() * t.element_size() for t in skeleton.state_dict().values())
    others = min(manifest.graph.other_bytes, (folder / PACKED).stat().st_size)
    declared = others + 4 * sum(layer.weight_count for layer in manifest.graph)
    if built > 2 * declared + 2**20:
        raise PackedFormat(folder / CONFIG, f"builds a model of {built} bytes, its packed file holds one of {declared}")


def load_packed(path: str | os.PathLike[str], skeleton: nn.Module, *, cast: bool = False) -> Manifest:
    """Turn `skeleton` (the float model, any weights) into the packed model at `path`, in place.

    cast: to the dtypes of `skeleton`; else it takes those of the file. Raises PackedFormat for a bad file,
    PolicyMismatch when the file is for another model.
    """
    tensors, manifest = read_packed(path)
    expose_experts(skeleton)
    split_experts(skeleton, split_stacks(manifest.graph.names))
    modules = dict(skeleton.named_modules())
    shapes = {n: tuple(m.weight.shape) for n, m in modules.items() if isinstance(getattr(m, "weight", None), Tensor)}
    wrong = [layer.name for layer in manifest.graph if shapes.get(layer.name) != layer.weight_shape]
    if wrong:
        raise PolicyMismatch((), wrong)
    quantize_to_policy(skeleton, manifest.graph, manifest.policy)
    load_quantized(path, skeleton, tensors, cast=cast)
    return manifest
