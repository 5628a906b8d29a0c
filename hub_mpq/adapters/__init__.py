"""From a model id to a model with its LayerGraph. timm and transformers are imported when a model of theirs is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.library import Library, libraries, register_library
from ..errors import HubMPQError, InvalidArgument
from .base import Source, cannot_build
from .module import ModuleLibrary, from_module
from .timm import TimmLibrary
from .trace import build_graph, norm_of, observe_signed, trace
from .transformers import TransformersLibrary

__all__ = ["Source", "build_graph", "from_module", "load", "norm_of", "observe_signed", "trace"]

for _library in (TimmLibrary(), TransformersLibrary(), ModuleLibrary()):
    register_library(_library)


def load(
    model_id: str, *, pretrained: bool = True, library: str | None = None, meta: bool = False, **kwargs: Any
) -> Source:
    """Build a model of any registered library.

    Args:
        model_id: A timm name ("resnet18"), a Hub id ("timm/resnet18.a1_in1k", "hf-hub:user/name", "org/name"), a
            folder with a config.json, or what another registered library knows.
        pretrained: Load the weights too.
        library: Name of the library; found by the id, then by the config.json, when left out.
        meta: Take neither weights nor memory, and no network for a timm name or a folder.
        **kwargs: Arguments of the library's `load`.

    Raises:
        InvalidArgument: The id names nothing, or there is no such library.
        HubMPQError: Files cannot be had.
    """
    model_id = str(model_id)
    found = _find(model_id, kwargs.get("revision")) if library is None else libraries.get(library)
    source: Source = found.load(model_id, pretrained=pretrained, meta=meta, **kwargs)
    return source


def _find(model_id: str, revision: str | None) -> Library:
    if not model_id.strip():
        raise InvalidArgument("the model id is empty")
    folder = Path(model_id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InvalidArgument(f"{model_id!r} holds no config.json, so it is no model folder")
        return _owner(model_id, folder / "config.json")
    if model_id.startswith((".", "/", "~", "\\")):
        raise InvalidArgument(f"no such folder: {model_id!r}")
    for library in libraries:
        if library.knows(model_id):
            return library
    from huggingface_hub import hf_hub_download

    try:
        return _owner(model_id, Path(hf_hub_download(model_id, "config.json", revision=revision)))
    except HubMPQError:
        raise
    except Exception as error:
        near = [] if "/" in model_id else [name for library in libraries for name in library.near_names(model_id)]
        if near:
            raise InvalidArgument(f"unknown model {model_id!r}; did you mean {' or '.join(near)}?") from error
        raise cannot_build(model_id, error, pretrained=False) from error


def _owner(model_id: str, file: Path) -> Library:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise HubMPQError(f"the config.json of {model_id!r} can't be read: {error}") from error
    for library in libraries:
        if isinstance(config, dict) and library.owns(config):
            return library
    known = " nor ".join(library.name for library in libraries if library.builds_from_folder)
    raise InvalidArgument(f"the config.json of {model_id!r} is of no registered library: neither {known}")
