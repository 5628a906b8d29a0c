"""From a model id to a model with its LayerGraph. timm and transformers are imported when a model of theirs is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ..errors import HubMPQError, InvalidArgument
from .base import Source, cannot_build
from .module import from_module
from .trace import build_graph, norm_of, observe_signed, trace

__all__ = ["Source", "build_graph", "from_module", "load", "norm_of", "observe_signed", "trace"]

Library = Literal["timm", "transformers"]


def load(
    model_id: str, *, pretrained: bool = True, library: Library | None = None, meta: bool = False, **kwargs: Any
) -> Source:
    """The Source of a model of timm or transformers.

    `model_id`: a timm name ("resnet18"), a Hub id ("timm/resnet18.a1_in1k", "hf-hub:user/name", "org/name") or a
    folder with a config.json. `pretrained=False`: no weights. `meta`: neither weights nor memory, and no network
    for a timm name or a folder. Other arguments: see `load_timm` and `load_transformers`.
    Raises InvalidArgument for an id that names nothing, HubMPQError when files can't be had.
    """
    if library not in (None, "timm", "transformers"):
        raise InvalidArgument(f"library is timm or transformers, not {library!r}")
    model_id = str(model_id)
    if (library or _library(model_id, kwargs.get("revision"))) == "timm":
        from .timm import load_timm

        return load_timm(model_id, pretrained=pretrained, meta=meta, **kwargs)
    from .transformers import load_transformers

    return load_transformers(model_id, pretrained=pretrained, meta=meta, **kwargs)


def _library(model_id: str, revision: str | None) -> Library:
    if not model_id.strip():
        raise InvalidArgument("the model id is empty")
    folder = Path(model_id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InvalidArgument(f"{model_id!r} holds no config.json, so it is no model folder")
        return _library_of(model_id, folder / "config.json")
    if model_id.startswith((".", "/", "~", "\\")):
        raise InvalidArgument(f"no such folder: {model_id!r}")
    if model_id.startswith(("timm/", "hf-hub:", "hf_hub:", "local-dir:")):
        return "timm"
    from .timm import is_timm_name, near_names

    if is_timm_name(model_id):
        return "timm"
    from huggingface_hub import hf_hub_download

    try:
        return _library_of(model_id, Path(hf_hub_download(model_id, "config.json", revision=revision)))
    except HubMPQError:
        raise
    except Exception as error:
        near = [] if "/" in model_id else near_names(model_id)
        if near:
            raise InvalidArgument(f"unknown model {model_id!r}; did you mean {' or '.join(near)}?") from error
        raise cannot_build(model_id, error, pretrained=False) from error


def _library_of(model_id: str, file: Path) -> Library:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise HubMPQError(f"the config.json of {model_id!r} can't be read: {error}") from error
    if isinstance(config, dict) and "architecture" in config:
        return "timm"
    if isinstance(config, dict) and "model_type" in config:
        return "transformers"
    raise InvalidArgument(
        f"the config.json of {model_id!r} is neither timm's (architecture) nor transformers' (model_type)"
    )
