"""Talking to the Hub: the client, which ids are repos, and its errors in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import __version__
from ..errors import HubMPQError, InvalidArgument, is_connection_error
from ..versions import warn_if_untested

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def hub_api(token: str | bool | None = None) -> HfApi:
    """The Hub client, under this package's own name."""
    from huggingface_hub import HfApi

    warn_if_untested("huggingface_hub")
    return HfApi(token=token, library_name="hub-mpq", library_version=__version__)


def repo_of(model_id: str) -> tuple[str, str | None] | None:
    """(repo, revision named in the id) of "me/name" or "hf-hub:me/name@revision"; None for what is no Hub repo.

    timm's own repos and names are none: nobody publishes packed weights there.
    """
    text = str(model_id)
    if Path(text).exists() or text.startswith(("timm/", "local-dir:")):
        return None
    for prefix in ("hf-hub:", "hf_hub:"):
        text = text.removeprefix(prefix)
    repo, _, revision = text.partition("@")
    return (repo, revision or None) if _REPO.fullmatch(repo) and ".." not in repo else None


def check_repo_id(repo_id: str) -> str:
    """The id itself, or InvalidArgument unless it is "owner/name"."""
    if not _REPO.fullmatch(repo_id) or ".." in repo_id:
        raise InvalidArgument(f"a Hub repo is named owner/name, not {repo_id!r}")
    return repo_id


@contextmanager
def hub_errors(doing: str, after: str = "") -> Iterator[None]:
    """Raise what the client raises as one HubMPQError: `doing`, why it did not happen, and how things stand `after`.

    Bugs pass as they are.
    """
    try:
        yield
    except HubMPQError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise HubMPQError(f"{doing}: {reason}{after}") from error


def _reason(error: BaseException) -> str | None:
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # around the upload of one file
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        return "its owner has not given you access; ask on its page"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repo, or it is private and your token may not see it (token=, or HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return "it is not in the local cache, and the Hub can't be reached or may not be asked"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "no"
        said = (error.server_message or "").strip() or str(error).strip().partition("\n")[0]
        hint = "; does your token allow it?" if status in (401, 403) else ""
        return f"the Hub answered {status} ({said}){hint}"
    if isinstance(error, errors.HFValidationError) or is_connection_error(error):
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None
