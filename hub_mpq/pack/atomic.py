"""Write files atomically, with what this requires: flushing, locks, and cleaning up after killed processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import HubMPQError

try:
    import fcntl
except ImportError:  # Windows: temporary files of killed processes stay
    fcntl = None  # type: ignore[assignment]


def write_atomic(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview]) -> int:
    """Write `chunks` to a new file next to `path`, flush it, and rename it to `path`; returns the bytes written.

    At any time, `path` is either the old file or the complete new one. On an error the old file stays and the new one
    is removed. A killed process leaves a hidden file, which the next write to `path` removes.

    Raises:
        HubMPQError: The file cannot be written.
    """
    path = Path(path)
    try:
        _remove_leftovers(path)
        with _temporary(path) as temporary:
            with open(temporary, "r+b", buffering=0) as file:
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view.nbytes:
                        view = view[file.write(view) :]
                total = file.tell()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise HubMPQError(f"cannot write {path}: {why(error)}; existing files are unchanged") from error
    sync_folder(path.parent)
    return total


def why(error: OSError) -> str:
    """Why the system could not write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "the disk is full" if full else error.strerror or str(error)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder, if the file system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def flush_tree(folder: Path) -> None:
    """Flush all files below a folder, and their names: a power cut must not leave a name without content."""
    for root, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(root, name)):
                handle = os.open(os.path.join(root, name), os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        sync_folder(Path(root))


def hidden_stem(path: Path) -> str:
    """Prefix of the names of temporary files and folders for `path`: hidden, and within the length limit of names."""
    name = path.name
    return f".{name if len(os.fsencode(name)) < 180 else hashlib.sha256(os.fsencode(name)).hexdigest()}."


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a file or folder while the block runs, at most as long as this process lives; yields whether it is locked.

    It is not locked if another process holds the lock (unless `wait`), or if the file system has no locks.
    """
    handle, locked = None, False
    with contextlib.suppress(OSError):
        if fcntl is not None:
            handle = os.open(path, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
    try:
        yield locked
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new empty file next to `path`, locked; removed afterwards if it still has this name."""
    while True:
        temporary = path.with_name(f"{hidden_stem(path)}{secrets.token_hex(8)}.tmp")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        with hold(temporary, wait=True):
            if not temporary.exists():  # removed as a leftover before it was locked
                continue
            try:
                yield temporary
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            return


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed writers of `path`; those of running ones are locked."""
    mine = re.compile(re.escape(hidden_stem(path)) + r"[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if mine.fullmatch(name):
                with hold(path.with_name(name)) as free:
                    if free:
                        path.with_name(name).unlink(missing_ok=True)
