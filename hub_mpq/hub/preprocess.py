"""Preprocessing files of a model: tokenizers, image processors, generation defaults."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..core.files import CONFIG
from ..core.library import Library, libraries
from ..errors import HubMPQError
from .cached import OPTIONAL, is_foreign_link
from .remote import COMMIT, FILES, bounded, hub_api, hub_errors, repo_of


def preprocess_names() -> tuple[str, ...]:
    """Names of the preprocessing files of all libraries."""
    return tuple(dict.fromkeys(name for library in libraries for name in library.preprocessing))


def local_preprocess(folder: Path | None, library: str, input_shape: tuple[int, ...]) -> dict[str, bytes]:
    """Read a library's preprocessing files from the folder that a model was loaded from.

    Args:
        folder: The folder; None if there was none.
        library: Name of the library.
        input_shape: Input shape of the model, which may differ from the folder's.

    Returns:
        `{name: content}`; {} without a folder.
    """
    if folder is None:
        return {}
    owner = libraries.get(library)
    found = {}
    for name in owner.preprocessing:
        if is_foreign_link(folder / name):
            warnings.warn(f"{folder / name} is a symbolic link and is not copied", stacklevel=2)
        elif (folder / name).is_file():
            found[name] = (folder / name).read_bytes()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if found else {}
    return {name: _resized(owner, name, content, config, input_shape) for name, content in found.items()}


def _resized(
    library: Library, name: str, content: bytes, config: Mapping[str, Any], input_shape: tuple[int, ...]
) -> bytes:
    try:
        return library.resized(name, content, config, input_shape)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RecursionError):
        warnings.warn(f"{name} cannot be read and is copied unchanged, even if the input size differs", stacklevel=2)
        return content


def preprocess_files(
    base_model: str, revision: str | None, *, library: str, token: str | bool | None = None
) -> dict[str, Path]:
    """Find the base model's preprocessing files.

    A base that cannot be reached has none: a packed model runs without them.

    Args:
        base_model: The base model as the (untrusted) packed file names it: a Hub id, never a local path.
        revision: Its revision.
        library: Name of its library.
        token: Hub token, as in huggingface_hub.

    Returns:
        `{name: path}`; {} for a library without such files, or if none are found.
    """
    wanted = libraries.get(library).preprocessing
    found = repo_of(base_model)
    if not wanted or found is None:
        return {}
    api = hub_api(token)
    revision = revision if revision and COMMIT.fullmatch(revision) else None
    try:
        with hub_errors(f"cannot download files of {found[0]}"), bounded(OPTIONAL):
            names = {file.path for file in islice(api.list_repo_tree(found[0], revision=revision), FILES)}
            there = [name for name in wanted if name in names]
            return {name: Path(api.hf_hub_download(found[0], name, revision=revision)) for name in there}
    except HubMPQError:
        return _cached(found[0], revision, wanted)


def _cached(repo: str, revision: str | None, wanted: tuple[str, ...]) -> dict[str, Path]:
    from huggingface_hub import try_to_load_from_cache

    found = {name: try_to_load_from_cache(repo, name, revision=revision) for name in wanted}
    return {name: Path(path) for name, path in found.items() if isinstance(path, str)}
