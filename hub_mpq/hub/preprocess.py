"""Files that say how a model's input is made: tokenizers, image processors, generation defaults."""

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
    """Names of the files of all libraries; no other file of a folder or repo is taken for one."""
    return tuple(dict.fromkeys(name for library in libraries for name in library.preprocessing))


def local_preprocess(folder: Path | None, library: str, input_shape: tuple[int, ...]) -> dict[str, bytes]:
    """{name: content} of a library's files in the folder that a model was loaded from; {} when it was no folder.

    `input_shape`: of the model, which may have been given another than the folder's own.
    """
    if folder is None:
        return {}
    owner = libraries.get(library)
    found = {}
    for name in owner.preprocessing:
        if is_foreign_link(folder / name):
            warnings.warn(f"{folder / name} is a link and is not copied", stacklevel=2)
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
        warnings.warn(f"{name} cannot be read and is copied as it is, whatever the input size", stacklevel=2)
        return content


def preprocess_files(
    base_model: str, revision: str | None, *, library: str, token: str | bool | None = None
) -> dict[str, Path]:
    """{name: path} of the base model's own files; {} for a library without such files, or where none are found.

    `base_model` is what a packed file says, which others may have written: a Hub id, never a path on this disk.
    A base that can't be reached leaves them out: they are its files, and a packed model runs without them.
    """
    wanted = libraries.get(library).preprocessing
    found = repo_of(base_model)
    if not wanted or found is None:
        return {}
    api = hub_api(token)
    revision = revision if revision and COMMIT.fullmatch(revision) else None
    try:
        with hub_errors(f"files of {found[0]} can't be fetched"), bounded(OPTIONAL):
            names = {file.path for file in islice(api.list_repo_tree(found[0], revision=revision), FILES)}
            there = [name for name in wanted if name in names]
            return {name: Path(api.hf_hub_download(found[0], name, revision=revision)) for name in there}
    except HubMPQError:
        return _cached(found[0], revision, wanted)


def _cached(repo: str, revision: str | None, wanted: tuple[str, ...]) -> dict[str, Path]:
    from huggingface_hub import try_to_load_from_cache

    found = {name: try_to_load_from_cache(repo, name, revision=revision) for name in wanted}
    return {name: Path(path) for name, path in found.items() if isinstance(path, str)}
