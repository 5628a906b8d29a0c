"""From a model id to a model with its LayerGraph. timm and transformers are imported only when they are needed."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ..core.library import Library, libraries, register_library
from ..errors import HubMPQError, InvalidArgument
from .base import Source, find_config
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
            folder with a config.json, or an id that another registered library recognizes.
        pretrained: Load the weights too.
        library: Name of the library; None to detect it from the id, then from the config.json.
        meta: Build on the meta device: no weights and no memory, and no network for a timm name or a folder.
        **kwargs: Arguments of the library's `load`.

    Returns:
        The model with its layers and an example input.

    Raises:
        InvalidArgument: The id or the library is unknown.
        HubMPQError: Files cannot be downloaded or read.

    Example:
        >>> from hub_mpq.adapters import load
        >>> source = load("resnet18", meta=True)
        >>> source.library, len(source.graph.layers)
        ('timm', 21)
    """
    model_id = str(model_id)
    found = _find(model_id, kwargs.get("revision"), kwargs.get("token")) if library is None else libraries.get(library)
    source: Source = found.load(model_id, pretrained=pretrained, meta=meta, **kwargs)
    return source


def _find(model_id: str, revision: str | None, token: str | bool | None) -> Library:
    if not model_id.strip():
        raise InvalidArgument("the model id is empty")
    folder = Path(model_id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InvalidArgument(f"{model_id!r} is not a model folder: it contains no config.json")
        return _owner(model_id, folder / "config.json")
    path = model_id.removeprefix("local-dir:")
    if path.startswith((".", "/", "~", "\\")) or (path != model_id and not Path(path).is_dir()):
        raise InvalidArgument(f"no such folder: {model_id!r}")
    for library in libraries:
        if library.knows(model_id):
            return library
    return _owner(model_id, find_config(model_id, lambda: _near_names(model_id), revision, token))


def _near_names(model_id: str) -> list[str]:
    names = [name for library in libraries for name in library.near_names(model_id)]
    alike = difflib.SequenceMatcher(b=model_id)

    def ratio(name: str) -> float:
        alike.set_seq1(name if "/" in model_id else name.rpartition("/")[2])
        return alike.ratio()

    return sorted(names, key=ratio, reverse=True)[:3]


def _owner(model_id: str, file: Path) -> Library:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HubMPQError(f"cannot read the config.json of {model_id!r}: {error}") from error
    for library in libraries:
        if isinstance(config, dict) and library.owns(config):
            return library
    known = " or ".join(library.name for library in libraries if library.builds_from_folder)
    raise InvalidArgument(f"the config.json of {model_id!r} belongs to no registered library; expected {known}")
