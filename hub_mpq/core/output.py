"""Checks of output paths, made before the work whose result goes there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InvalidArgument


def check_output_folder(path: str | os.PathLike[str], files: Iterable[str] = ()) -> None:
    """Check that a folder can be written, whether it exists or not; nothing is created.

    Args:
        path: The folder, or a link to it.
        files: Names of the files to be written there.

    Raises:
        InvalidArgument: The path is a file or a broken link, is not writable, or one of the files is a folder.
    """
    folder = _checked(path)
    if folder.exists() and not folder.is_dir():
        raise InvalidArgument(f"{folder} is a file; give a folder")
    for file in (folder / name for name in files):
        if file.is_dir() and not file.is_symlink():
            raise InvalidArgument(f"{file} must be a file but is a folder; move it away or choose another output")
    _check_writable(folder, folder)


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written, whether it exists or not; nothing is created.

    Args:
        path: The file.

    Raises:
        InvalidArgument: The path is a folder, a device or a broken link, or is not writable.
    """
    file = _checked(path)
    if file.is_dir():
        raise InvalidArgument(f"{file} is a folder; give a file")
    if file.exists() and not file.is_file():
        raise InvalidArgument(f"{file} is not a regular file; choose another file")
    _check_writable(file.parent, file)


def _checked(path: str | os.PathLike[str]) -> Path:
    """The path; InvalidArgument if it is not a valid path on this system, or contains a broken link."""
    path = Path(path)
    try:
        os.path.abspath(path)
    except OSError:
        raise InvalidArgument(
            f"cannot write {path}: the current folder no longer exists; give an absolute path"
        ) from None
    for part in (path, *path.parents):
        try:
            os.lstat(part)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidArgument(f"cannot write {str(path)[:200]!r}: {reason}; choose another output") from None
        if not os.path.exists(part):
            raise InvalidArgument(f"{part} is a broken link; remove it or choose another output")
        break
    return path


def _check_writable(folder: Path, output: Path) -> None:
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        raise InvalidArgument(f"cannot write {output}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InvalidArgument(f"cannot write {output}: no permission to write to {there}; choose another output")
