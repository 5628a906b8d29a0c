"""Files that say how a model's input is made: tokenizers, image processors, generation defaults."""

from __future__ import annotations

import json
from pathlib import Path

from ..core.files import CONFIG
from ..core.library import libraries
from ..errors import is_connection_error
from .remote import hub_api, repo_of


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
    found = {name: (folder / name).read_bytes() for name in owner.preprocessing if (folder / name).is_file()}
    config = json.loads((folder / CONFIG).read_text()) if found else {}
    return {name: owner.resized(name, content, config, input_shape) for name, content in found.items()}


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
    try:
        names = set(api.list_repo_files(found[0], revision=revision))
        return {name: Path(api.hf_hub_download(found[0], name, revision=revision)) for name in wanted if name in names}
    except Exception as error:
        if is_connection_error(error):
            return _cached(found[0], revision, wanted)
        raise


def _cached(repo: str, revision: str | None, wanted: tuple[str, ...]) -> dict[str, Path]:
    from huggingface_hub import try_to_load_from_cache

    found = {name: try_to_load_from_cache(repo, name, revision=revision) for name in wanted}
    return {name: Path(path) for name, path in found.items() if isinstance(path, str)}
