"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from ..errors import HubMPQError


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system or platform can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview]) -> int:
    """Write `chunks` to a new file beside `path`, sync it, and put it in its place; return the bytes written.

    At every moment `path` is the old file or the new one, whole. On any failure the old one stays and the new
    one is removed (a killed process leaves its hidden `.<name>.<random>.tmp`). HubMPQError when the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(temporary, "xb", buffering=0) as file:
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view.nbytes:
                        view = view[file.write(view) :]
                total = file.tell()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise HubMPQError(f"cannot write {path}: {reason}; what was there before is untouched") from error
    _sync_folder(path.parent)
    return total
