"""Where something is to be written, checked before the work that makes it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InvalidArgument


def check_output_folder(path: str | os.PathLike[str], files: Iterable[str] = ()) -> None:
    """Check that a folder can be written, whether it is there or not. Nothing is made.

    Args:
        path: The folder. A link to a folder stands for that folder.
        files: Names of the files that are to be written.

    Raises:
        InvalidArgument: It is a file or a link that leads nowhere, this user may not write there, or there is a folder
            where a file is to be.
    """
    folder = _checked(path)
    if folder.exists() and not folder.is_dir():
        raise InvalidArgument(f"{folder} is a file; name a folder")
    for file in (folder / name for name in files):
        if file.is_dir() and not file.is_symlink():
            raise InvalidArgument(f"{file} is a folder, and a file goes there; move it away or name another output")
    _check_writable(folder, folder)


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written, whether it is there or not. Nothing is made.

    Args:
        path: The file.

    Raises:
        InvalidArgument: It is a folder, a device or a link that leads nowhere, or this user may not write there.
    """
    file = _checked(path)
    if file.is_dir():
        raise InvalidArgument(f"{file} is a folder; name a file")
    if file.exists() and not file.is_file():
        raise InvalidArgument(f"{file} is not a regular file; name another file")
    _check_writable(file.parent, file)


def _checked(path: str | os.PathLike[str]) -> Path:
    """The path itself; InvalidArgument where the system has no such names, or a link there leads nowhere."""
    path = Path(path)
    try:
        os.path.abspath(path)
    except OSError:
        raise InvalidArgument(f"{path} cannot be written: the current folder is gone; name an absolute path") from None
    for part in (path, *path.parents):
        try:
            os.lstat(part)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidArgument(f"{str(path)[:200]!r} cannot be written: {reason}; name another output") from None
        if not os.path.exists(part):
            raise InvalidArgument(f"{part} is a link that leads nowhere; remove it or name another output")
        break
    return path


def _check_writable(folder: Path, output: Path) -> None:
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        raise InvalidArgument(f"{output} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InvalidArgument(f"{output} cannot be written: you may not write into {there}; name another output")
