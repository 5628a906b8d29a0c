"""Download a published model: packed weights and their files, never the float copy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.base import no_connection
from ..core.files import CONFIG, FLOAT_COPY, INDICATORS, MANIFEST, PACKED
from ..core.output import check_output_folder
from ..errors import HubMPQError, InvalidArgument, PackedFormat, is_connection_error
from ..pack import Manifest, parse_manifest, read_packed
from ..pack.atomic import write_atomic
from ..pack.atomic_folder import atomic_folder, finish_interrupted
from ..pack.header import MAX_HEADER
from .cached import OPTIONAL, download_packed, mend_small, mended
from .preprocess import preprocess_names
from .remote import COMMIT, FILES, bounded, check_repo_id, hub_api, hub_errors, repo_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_FIRST = 1 << 16
_ANSWER = 16 << 20
"""Maximum bytes of a config or of a page of file names."""
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path | None:
    """Download a published model into the Hub client's cache, all of one commit.

    For a branch that has not moved one request is made; for a cached commit none, nor with `local_files_only` or
    HF_HUB_OFFLINE. Only files of known names are downloaded, whatever the repo lists; a warning names optional files
    that cannot be downloaded. Small files that have changed since their download are downloaded again.

    Args:
        repo_id: "owner/name".
        revision: Branch, tag or commit (40 hexadecimal digits).
        token: Hub token, as in huggingface_hub.
        local_files_only: Use cached files only.

    Returns:
        The folder in the cache; None if the repo does not hold a packed model.

    Raises:
        HubMPQError: The model cannot be downloaded.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    api, offline = hub_api(token), local_files_only or constants.HF_HUB_OFFLINE
    with hub_errors(f"cannot download {repo_id}"), bounded(_ANSWER):
        try:
            commit = revision if offline else _commit(api, repo_id, revision)
            config = api.hf_hub_download(repo_id, CONFIG, revision=commit, local_files_only=local_files_only)
        except LocalEntryNotFoundError:
            if local_files_only:
                raise
            return None  # loading a float model then reports what is missing
        except EntryNotFoundError:
            return None
    folder = Path(config).parent
    named = bool(COMMIT.fullmatch(folder.name))
    if named:
        mend_small(folder, (n for n in _wanted() if n != PACKED), token, offline)
    if not _is_packed(folder / CONFIG):
        return None
    if not named:
        raise HubMPQError(f"{repo_id}: expected a commit from the server, got {folder.name[:60]!r}")
    packed = (folder / PACKED).is_file()
    # transformers downloads only the packed file; ours is complete if the indicators, downloaded before it, are known
    if packed and try_to_load_from_cache(repo_id, INDICATORS, revision=folder.name) is not None:
        _remember(folder, revision, offline)
        return folder
    if offline:
        if packed:
            return folder
        raise HubMPQError(f"cannot download {repo_id}: its packed weights are not in the local cache")
    _fetch_files(api, repo_id, folder.name)
    _remember(folder, revision, offline)
    return folder


def _commit(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The current commit of a branch, which may move between requests; the revision itself if the Hub does not say."""
    from huggingface_hub import hf_hub_url

    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        found = api.get_hf_file_metadata(url=hf_hub_url(repo_id, CONFIG, revision=revision), token=api.token)
    except Exception as error:
        if not is_connection_error(error):
            raise
        return revision
    return found.commit_hash if COMMIT.fullmatch(found.commit_hash or "") else revision


def _fetch_files(api: HfApi, repo_id: str, commit: str) -> None:
    """Download all files of a published model, the packed one last: if it exists, the rest does too."""
    from huggingface_hub.errors import EntryNotFoundError

    with hub_errors(f"cannot download {repo_id}"), bounded(_ANSWER):
        tree = islice(api.list_repo_tree(repo_id, revision=commit), FILES)
        there = {file.path: int(getattr(file, "size", 0)) for file in tree}
        if INDICATORS not in there:
            with contextlib.suppress(EntryNotFoundError):  # so that the cache knows there is none
                api.hf_hub_download(repo_id, INDICATORS, revision=commit)
    for name in _wanted():
        if name in there and name not in (CONFIG, PACKED):
            try:
                size = max(there[name], _FIRST)  # error responses have a body too
                with hub_errors(f"cannot download {name} of {repo_id}"), bounded(min(size, OPTIONAL)):
                    api.hf_hub_download(repo_id, name, revision=commit)
            except HubMPQError as error:
                warnings.warn(f"{error}; the model is loaded without it", stacklevel=2)
    with hub_errors(f"cannot download {repo_id}"):
        try:
            download_packed(api, repo_id, commit)
        except EntryNotFoundError:
            raise HubMPQError(f"{repo_id} has the config of a packed model but not {PACKED}") from None


def _remember(folder: Path, revision: str | None, offline: bool) -> None:
    """Let the branch point to this commit in the cache, now that it is complete, so that it is found offline."""
    name = revision or "main"
    if not offline and not COMMIT.fullmatch(name) and _REVISION.fullmatch(name):
        file = folder.parents[1] / "refs" / name
        with contextlib.suppress(OSError, HubMPQError):  # a read-only cache is fine
            if not file.is_file() or file.read_text(encoding="utf-8") != folder.name:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, [folder.name.encode()])


def _wanted() -> tuple[str, ...]:
    """Names of the files of a published model in download order: if the packed file exists, the rest does too."""
    return (CONFIG, *preprocess_names(), INDICATORS, PACKED)


def _is_packed(config: Path) -> bool:
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
        return bool(tree["quantization_config"]["quant_method"] == "mpq")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def pull(
    repo_id: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download a published model and verify every byte of its weights.

    Args:
        repo_id: "owner/name".
        folder: New folder for a copy; None leaves the model in the cache.
        revision: Branch, tag or commit.
        token: Hub token, as in huggingface_hub.
        local_files_only: Use cached files only.

    Returns:
        The folder.

    Raises:
        InvalidArgument: The folder is not empty or cannot be written, or the name is not "owner/name".
        HubMPQError: The model cannot be downloaded.
        PackedFormat: The packed file was published incomplete or tampered with.
    """
    target = None if folder is None else Path(folder)
    if target is not None:
        check_output_folder(target)
        if target.exists() and any(target.iterdir()):
            raise InvalidArgument(f"{target} already exists and is not empty; choose a new folder")
    found = fetch(check_repo_id(repo_id), revision=revision, token=token, local_files_only=local_files_only)
    if found is None:
        raise HubMPQError(f"cannot pull {repo_id}: it holds no packed model, or the Hub cannot be reached")
    mended(found, lambda: read_packed(found / PACKED), token=token, offline=local_files_only)
    if target is None:
        return found
    with atomic_folder(target) as work:
        for name in _wanted():
            if (found / name).is_file():
                shutil.copyfile(found / name, work / name)
    return target


def remote_manifest(
    repo_id: str, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[Manifest, int] | None:
    """Read the manifest of a published model with a range request for the header of its packed file.

    For a repo in compressed-tensors format, read its manifest file.

    Args:
        repo_id: "owner/name".
        revision: Branch, tag or commit.
        token: Hub token, as in huggingface_hub.

    Returns:
        (manifest, bytes of the packed file). None for a repo with neither file, and with HF_HUB_OFFLINE.

    Raises:
        HubMPQError: The repo cannot be reached.
        PackedFormat: The header or the manifest is not valid.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        return None
    api = hub_api(token)
    name = f"{repo_id}/{PACKED}"

    def part(url: str, begin: int, end: int) -> bytes:
        headers = build_hf_headers(token=token, library_name=api.library_name, library_version=api.library_version)
        with bounded(end - begin):
            response = get_session().get(url, headers={**headers, "Range": f"bytes={begin}-{end - 1}"}, timeout=30)
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise HubMPQError(f"{name}: the server does not support range requests; pull the model instead")
        content: bytes = response.content
        return content[: end - begin]

    with hub_errors(f"cannot inspect {repo_id}"), bounded(1 << 60):
        try:
            found = api.get_hf_file_metadata(url=hf_hub_url(repo_id, PACKED, revision=revision), token=token)
        except EntryNotFoundError:
            return _manifest_file(repo_id, revision, token)
        size = found.size or 0
        url = hf_hub_url(repo_id, PACKED, revision=found.commit_hash)
        first = part(url, 0, min(size, _FIRST)) if size else b""
        header = 8 + int.from_bytes(first[:8], "little")
        if header > size or header - 8 > MAX_HEADER:
            raise PackedFormat(
                name, f"the header claims {header - 8} bytes, but the file has {size}: incomplete or tampered with"
            )
        if header > len(first):
            first += part(url, len(first), header)
    return parse_manifest(first, name), size


def _manifest_file(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Manifest, int] | None:
    """(manifest, bytes of the weights) of a repo in compressed-tensors format; None if hub-mpq did not write it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    api, name = hub_api(token), f"{repo_id}/{MANIFEST}"
    try:
        found = api.get_hf_file_metadata(url=hf_hub_url(repo_id, MANIFEST, revision=revision), token=token)
        weights = hf_hub_url(repo_id, FLOAT_COPY, revision=found.commit_hash)
        size = api.get_hf_file_metadata(url=weights, token=token).size
    except EntryNotFoundError:
        return None
    if (found.size or 0) > MAX_HEADER:
        raise PackedFormat(name, f"{found.size} bytes exceed the maximum size of a manifest")
    with bounded(MAX_HEADER):
        path = api.hf_hub_download(repo_id, MANIFEST, revision=found.commit_hash)
    try:
        return Manifest.from_text(Path(path).read_text(encoding="utf-8")), size or 0
    except (InvalidArgument, UnicodeDecodeError) as error:
        raise PackedFormat(name, str(error)) from None


def refuse_choices(model_id: str | os.PathLike[str], **asked: Any) -> None:
    """Refuse arguments that say how to quantize a model that is already packed.

    Args:
        model_id: The packed model.
        **asked: The arguments by name; empty or False ones are ignored.

    Raises:
        InvalidArgument: An argument was passed.
    """
    if told := [name for name, value in asked.items() if value]:
        raise InvalidArgument(
            f"{', '.join(told)} cannot be used with the packed model {str(model_id)!r}; to quantize it again, load its "
            "base model"
        )


def packed_folder(
    model_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path | None:
    """The folder of a packed model: a local one, or a published one, which is downloaded as by `fetch`.

    Args:
        model_id: A local folder or a Hub id.
        revision: Branch, tag or commit.
        token: Hub token, as in huggingface_hub.
        local_files_only: Use cached files only.

    Returns:
        The folder; None for everything else: a timm name, a float repo, a float folder.
    """
    if Path(model_id).is_dir():
        finish_interrupted(Path(model_id))
        return Path(model_id) if (Path(model_id) / PACKED).is_file() else None
    found = repo_of(str(model_id))
    if found is None:
        return None
    if not local_files_only and no_connection(found[0], revision or found[1], token) is not None:
        return None
    return fetch(found[0], revision=revision or found[1], token=token, local_files_only=local_files_only)
