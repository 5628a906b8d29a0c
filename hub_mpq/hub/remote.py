"""Talking to the Hub: the client, which ids are repos, and its errors in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import HubMPQError, InvalidArgument, is_connection_error
from ..versions import warn_if_untested

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT = re.compile(r"[0-9a-f]{40}")
FILES = 10_000
"""Files of a repo that are looked at, at most."""
_NAME = re.compile(r"\w[\w.+=:~-]{0,199}", re.ASCII)
_PATIENCE = 120
"""Seconds to wait, at most, when the Hub says how long."""
_limit: ContextVar[int | None] = ContextVar("limit", default=None)
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


class BadAnswer(HubMPQError):
    """A server answers what no Hub does, or more than can be taken."""


@contextmanager
def bounded(limit: int) -> Iterator[None]:
    """Check every answer that the client gets in this thread while the block runs.

    Refused with BadAnswer are bodies of more than `limit` bytes, and headers that are no names of files: the client
    writes to paths made of them.
    """
    _watch_client()
    before = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(before)


class _Watched:
    """Makes clients as before, whose answers are checked. Whenever a connection fails a new one is made."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        return _watched(self.make())


def _watch_client() -> None:
    from huggingface_hub.utils import _http

    if not isinstance(_http._GLOBAL_CLIENT_FACTORY, _Watched):
        if _http._GLOBAL_CLIENT is not None:
            _watched(_http._GLOBAL_CLIENT)
        _http._GLOBAL_CLIENT_FACTORY = _Watched(_http._GLOBAL_CLIENT_FACTORY)


def _watched(client: Any) -> Any:
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks.get("request", ()), _ask_plain],
        "response": [*hooks.get("response", ()), _check],
    }
    return client


def _ask_plain(request: Any) -> None:
    if _limit.get() is not None:
        request.headers["Accept-Encoding"] = "identity"  # a packed body may be a thousand times as long


def _check(response: Any) -> None:
    limit, headers = _limit.get(), response.headers
    if limit is None:
        return
    wait = re.search(r"\d+", headers.get("Retry-After", "")) or re.search(r"(?<=;t=)\d+", headers.get("RateLimit", ""))
    if response.status_code in (429, 503) and wait and int(wait[0][:9]) > _PATIENCE:
        raise BadAnswer(f"the Hub asks to wait {int(wait[0][:9])} s; try again then")
    if response.request.method == "HEAD":
        for name in ("X-Linked-Etag", "ETag", "X-Repo-Commit"):
            if name in headers and not _NAME.fullmatch(headers[name].lstrip("W/").strip('"')):
                raise BadAnswer(f"the server's {name}, {headers[name][:60]!r}, is no name")
    elif headers.get("Content-Encoding", "identity") != "identity":
        raise BadAnswer("the server compresses what it was asked to send as it is")
    for name in ("X-Linked-Size", "Content-Length") if response.request.method == "HEAD" else ("Content-Length",):
        size = headers.get(name, "") if response.status_code < 400 else ""  # else the status says more
        if size.isdecimal() and (len(size) > 18 or int(size) > limit):
            raise BadAnswer(f"the server announces {size[:30]} bytes where at most {limit:,} are expected")
    if response.request.method != "HEAD":
        response.stream = _bounded_stream(response.stream, limit)


def _bounded_stream(stream: Any, limit: int) -> Any:
    """The stream, which ends with an error beyond `limit` bytes."""
    base: Any = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    class Bounded(base):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            left = limit
            for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    raise BadAnswer(f"the server sends more than the {limit:,} bytes that are expected")
                yield chunk

        def close(self) -> None:
            stream.close()

    return Bounded()


@contextmanager
def hub_errors(doing: str, after: str = "") -> Iterator[None]:
    """Raise what the client raises as one HubMPQError: `doing`, why it did not happen, and how things stand `after`.

    Bugs pass as they are.
    """
    try:
        yield
    except BadAnswer as error:
        raise HubMPQError(f"{doing}: {error}{after}") from error
    except HubMPQError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise HubMPQError(f"{doing}: {reason}{after}") from error


def _reason(error: BaseException) -> str | None:
    from huggingface_hub import errors

    # around the upload of one file, or a forced download
    if isinstance(error, (RuntimeError, ValueError)) and error.__cause__ is not None:
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
    if isinstance(error, json.JSONDecodeError):
        return "its answer is no JSON; is this a Hub (HF_ENDPOINT)?"
    if _raised_by_client(error):
        return f"its answer cannot be used ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"
    return None


def _raised_by_client(error: BaseException) -> bool:
    """Whether the client itself stumbled, over an answer of another form than it knows."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "huggingface_hub"
