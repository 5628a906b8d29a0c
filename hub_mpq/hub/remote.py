"""Access to the Hub: the client, which ids are repos, and its errors as messages."""

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
"""Maximum number of files of a repo that are listed."""
_NAME = re.compile(r"\w[\w.+=:~-]{0,199}", re.ASCII)
_PATIENCE = 120
"""Maximum seconds to wait when the Hub asks for it."""
_limit: ContextVar[int | None] = ContextVar("limit", default=None)
_REPO = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def hub_api(token: str | bool | None = None) -> HfApi:
    """The Hub client, with this package's name as the library name."""
    from huggingface_hub import HfApi

    warn_if_untested("huggingface_hub")
    return HfApi(token=token, library_name="hub-mpq", library_version=__version__)


def repo_of(model_id: str) -> tuple[str, str | None] | None:
    """(repo, revision in the id) of "me/name" or "hf-hub:me/name@revision"; None for what is not a Hub repo.

    timm's own repos and names are not: nobody publishes packed weights there.
    """
    text = str(model_id)
    if Path(text).exists() or text.startswith(("timm/", "local-dir:")):
        return None
    for prefix in ("hf-hub:", "hf_hub:"):
        text = text.removeprefix(prefix)
    repo, _, revision = text.partition("@")
    return (repo, revision or None) if _REPO.fullmatch(repo) and ".." not in repo else None


def check_repo_id(repo_id: str) -> str:
    """The id itself; InvalidArgument unless it is "owner/name"."""
    if not _REPO.fullmatch(repo_id) or ".." in repo_id:
        raise InvalidArgument(f"repo_id must be owner/name, got {repo_id!r}")
    return repo_id


class BadAnswer(HubMPQError):
    """A response that no Hub sends, or that is larger than expected."""


@contextmanager
def bounded(limit: int) -> Iterator[None]:
    """Check every response that the client gets in this thread while the block runs.

    BadAnswer is raised for bodies of more than `limit` bytes, and for headers that are not valid file names: the client
    writes to paths made from them.
    """
    _watch_client()
    before = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(before)


class _Watched:
    """A factory of clients whose responses are checked; a new client is made whenever a connection fails."""

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
        request.headers["Accept-Encoding"] = "identity"  # a compressed body may expand a thousandfold


def _check(response: Any) -> None:
    limit, headers = _limit.get(), response.headers
    if limit is None:
        return
    wait = re.search(r"\d+", headers.get("Retry-After", "")) or re.search(r"(?<=;t=)\d+", headers.get("RateLimit", ""))
    if response.status_code in (429, 503) and wait and int(wait[0][:9]) > _PATIENCE:
        raise BadAnswer(f"the Hub asks to wait {int(wait[0][:9])} s; try again later")
    if response.request.method == "HEAD":
        for name in ("X-Linked-Etag", "ETag", "X-Repo-Commit"):
            if name in headers and not _NAME.fullmatch(headers[name].lstrip("W/").strip('"')):
                raise BadAnswer(f"the server's {name} header {headers[name][:60]!r} is not valid")
    elif headers.get("Content-Encoding", "identity") != "identity":
        raise BadAnswer("the server sent a compressed response, although an uncompressed one was requested")
    for name in ("X-Linked-Size", "Content-Length") if response.request.method == "HEAD" else ("Content-Length",):
        size = headers.get(name, "") if response.status_code < 400 else ""  # for errors the status says more
        if size.isdecimal() and (len(size) > 18 or int(size) > limit):
            raise BadAnswer(f"the server announces {size[:30]} bytes, but at most {limit:,} are expected")
    if response.request.method != "HEAD":
        response.stream = _bounded_stream(response.stream, limit)


def _bounded_stream(stream: Any, limit: int) -> Any:
    """The stream, which raises an error beyond `limit` bytes."""
    base: Any = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")

    class Bounded(base):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            left = limit
            for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    raise BadAnswer(f"the server sent more than the expected {limit:,} bytes")
                yield chunk

        def close(self) -> None:
            stream.close()

    return Bounded()


@contextmanager
def hub_errors(doing: str, after: str = "") -> Iterator[None]:
    """Raise the client's errors as HubMPQError: what failed (`doing`), why, and the resulting state (`after`).

    Bugs are raised unchanged.
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
        return "access is restricted; request it on the repo's page"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "repo not found, or it is private and your token has no access (token=, or HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision not found"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return "it is not in the local cache, and the Hub cannot be reached or requests are disabled"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "no"
        said = (error.server_message or "").strip() or str(error).strip().partition("\n")[0]
        hint = "; check the permissions of your token" if status in (401, 403) else ""
        return f"the Hub answered {status} ({said}){hint}"
    if isinstance(error, errors.HFValidationError) or is_connection_error(error):
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, json.JSONDecodeError):
        return "the response is not valid JSON; check that HF_ENDPOINT is a Hub"
    if _raised_by_client(error):
        return f"unexpected response ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"
    return None


def _raised_by_client(error: BaseException) -> bool:
    """Whether the client itself failed, on a response in a form that it does not know."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "huggingface_hub"
