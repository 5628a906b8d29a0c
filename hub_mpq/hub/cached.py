"""Files in the Hub client's cache: whether they are intact, and how they are downloaded again."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.files import CONFIG, PACKED
from ..errors import HubMPQError, PackedFormat
from .remote import COMMIT, BadAnswer, bounded, check_repo_id, hub_api, hub_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OPTIONAL = 256 << 20
"""Maximum bytes of an optional file."""
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
Loaded = TypeVar("Loaded")


def repo_of_snapshot(folder: Path) -> str | None:
    """The repo of a folder `models--OWNER--NAME/snapshots/COMMIT`; None for any other folder."""
    folder = folder.absolute()
    if not COMMIT.fullmatch(folder.name) or folder.parent.name != "snapshots":
        return None
    kind, _, name = folder.parents[1].name.partition("--")
    try:
        return check_repo_id(name.replace("--", "/", 1)) if kind == "models" else None
    except ValueError:
        return None


def is_foreign_link(file: Path) -> bool:
    """Whether a file is a link that the Hub client did not create, so its target may not be meant for publishing."""
    if not file.is_symlink():
        return False
    from huggingface_hub import constants

    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    return not all(Path(os.path.realpath(p)).is_relative_to(cache) for p in (file.parent, file))


def as_downloaded(file: Path) -> bool:
    """Whether a cached file still has its downloaded content, as far as that can be checked.

    The client names files by the Hub's digest of their content: SHA-256, or git's SHA-1 for small ones (some mirrors
    use the plain SHA-1). Files with other names, and caches without links, cannot be checked: True.
    """
    try:
        name = os.path.basename(os.readlink(file))
        if not _DIGEST.fullmatch(name):
            return True
        digests = [hashlib.sha256()] if len(name) == 64 else [hashlib.sha1(usedforsecurity=False) for _ in range(2)]
        if len(digests) == 2:
            digests[1].update(b"blob %d\0" % file.stat().st_size)
        with open(file, "rb") as opened:
            while chunk := opened.read(1 << 20):
                for digest in digests:
                    digest.update(chunk)
    except OSError:
        return True
    return name in [digest.hexdigest() for digest in digests]


def download_packed(api: HfApi, repo_id: str, commit: str, **how: Any) -> None:
    """Download the packed file: as many bytes as the Hub announces, if the disk has room for them."""
    from huggingface_hub import constants, hf_hub_url

    with bounded(1 << 60):
        found = api.get_hf_file_metadata(url=hf_hub_url(repo_id, PACKED, revision=commit), token=api.token)
    cache = Path(how.get("cache_dir") or constants.HF_HUB_CACHE)
    size, free = found.size or 0, shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    if size > free:
        raise BadAnswer(f"{PACKED} has {size:,} bytes, but only {free:,} are free in {cache}")
    with bounded(max(size, 1 << 16)):  # error responses have a body too
        api.hf_hub_download(repo_id, PACKED, revision=commit, **how)


def mend_small(folder: Path, names: Iterable[str], token: str | bool | None, offline: bool) -> None:
    """Download again every small file of a folder that has changed since it was downloaded.

    Raises HubMPQError if the config cannot be downloaded; warns about others.
    """
    for name in names:
        if not (folder / name).is_file() or as_downloaded(folder / name):
            continue
        try:
            _fetch_anew(folder, name, token, offline)
        except HubMPQError as error:
            if name == CONFIG:
                raise
            warnings.warn(str(error), stacklevel=2)


def _fetch_anew(folder: Path, name: str, token: str | bool | None, offline: bool) -> None:
    repo_id = repo_of_snapshot(folder)
    if offline or repo_id is None:
        raise HubMPQError(f"{folder / name} has changed since it was downloaded; load it online, or delete {folder}")
    api = hub_api(token)
    how: dict[str, Any] = {"cache_dir": folder.parents[2], "force_download": True}
    with hub_errors(f"{name} of {repo_id} is damaged in the cache and cannot be downloaded again"), bounded(OPTIONAL):
        if name == PACKED:
            download_packed(api, repo_id, folder.name, **how)
        else:
            api.hf_hub_download(repo_id, name, revision=folder.name, **how)


def mended(
    folder: Path, load: Callable[[], Loaded], *, token: str | bool | None = None, offline: bool = False
) -> Loaded:
    """Return what `load` returns, which reads the packed file of a folder.

    A damaged file in the Hub client's cache is downloaded again first.

    Args:
        folder: The folder. For other folders, and for a file that was published damaged, PackedFormat is raised.
        load: Called once, or twice if the file was damaged.
        token: Hub token, as in huggingface_hub.
        offline: Make no request.

    Raises:
        HubMPQError: The file is damaged and cannot be downloaded.
    """
    from huggingface_hub import constants

    try:
        return load()
    except PackedFormat:
        file = folder / PACKED
        if repo_of_snapshot(folder) is None or not file.is_file() or as_downloaded(file):
            raise
    _fetch_anew(folder, PACKED, token, offline or constants.HF_HUB_OFFLINE)
    return load()
