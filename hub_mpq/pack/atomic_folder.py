"""Replace several files of a folder atomically, even if the process is killed.

The new files are written to a hidden folder next to the target. If the target contains only files, those that stay are
hard-linked into the hidden folder, and the two folders swap names in one step of the file system. Otherwise (a mount
point, the current folder, a folder that contains folders, a file system that cannot swap) the hidden folder is inside
the target: it is renamed once it is complete, and from then on its files are moved into place, either immediately or,
if the process was killed, by `finish_interrupted`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from ..core.files import FLOAT_COPY, INDICATORS
from ..core.output import check_output_folder
from ..errors import HubMPQError
from .atomic import flush_tree, hidden_stem, hold, sync_folder, why

_NEW, _WHOLE, _DROP = ".hub-mpq-new", ".hub-mpq-whole", ".hub-mpq-drop"
_INSIDE = re.compile(r"\.[0-9a-f]{16}\.hub-mpq-(new|whole)")
_DROPPED = (INDICATORS, FLOAT_COPY)
"""Files of the old version that a new one may lack."""


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str], drop: Collection[str] = ()) -> Iterator[Path]:
    """Yield a folder for new files of `target`; at the end all are moved into place, or none if an error occurred.

    Other files in `target` stay. Leftovers of killed processes are removed. Links with the names of new files are
    replaced, not followed.

    Args:
        target: The folder, created if it does not exist. A link to a folder is kept and followed.
        drop: Names of old files that the new version lacks, out of INDICATORS and FLOAT_COPY.

    Raises:
        InvalidArgument: The folder cannot be used as an output.
        HubMPQError: The files cannot be written.
    """
    check_output_folder(target)
    shown, target = target, Path(os.path.realpath(target))
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        finish_interrupted(target)
        _remove_leftovers(target)
        with _staged(target) as work:
            yield work
            flush_tree(work)
            _commit(work, target, drop)
    except OSError as error:
        raise HubMPQError(f"cannot write {shown}: {why(error)}; existing files are unchanged") from error
    except HubMPQError as error:
        if work is None or str(work) not in str(error):
            raise
        raise HubMPQError(str(error).replace(str(work), str(shown))) from error  # do not show the hidden folder


def remove_folder(folder: Path) -> None:
    """Remove a folder of hub-mpq, renamed first so that no incomplete folder is ever visible.

    If the process is killed, the next call for this path, or the next `atomic_folder`, removes the rest.
    """
    _remove_leftovers(folder)
    gone = folder.with_name(f"{hidden_stem(folder)}{secrets.token_hex(8)}{_NEW}")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def finish_interrupted(target: Path) -> bool:
    """Finish moving files into place that a killed process had started; returns whether there was anything to do.

    Raises:
        HubMPQError: The folder cannot be written.
    """
    try:
        found = sorted(p for p in target.iterdir() if _INSIDE.fullmatch(p.name) and p.name.endswith(_WHOLE))
    except OSError:
        return False
    finished = False
    for whole in filter(_is_folder, found):
        with hold(whole, wait=True):
            if _is_folder(whole):  # else the lock's holder has finished it
                _finish(whole, target)
                finished = True
    return finished


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A new folder for the new files, locked; removed afterwards if it still has this name."""
    while True:
        work = _make(target)
        with hold(work, wait=True):
            if not work.exists():  # removed as a leftover before it was locked
                continue
            made = work.stat()
            try:
                yield work
            finally:
                with contextlib.suppress(OSError):
                    if os.path.samestat(made, work.stat()):  # else it is the old folder: `_discard` removes it
                        shutil.rmtree(work)
            return


def _make(target: Path) -> Path:
    token = secrets.token_hex(8)
    if not target.exists() or _flat(target):
        with contextlib.suppress(PermissionError):
            work = target.parent / f"{hidden_stem(target)}{token}{_NEW}"
            work.mkdir()
            with contextlib.suppress(FileNotFoundError):  # removed as a leftover
                # the inode number tells whoever finds it later whether the folders were swapped
                return work.rename(work.with_name(f"{hidden_stem(target)}{token}-{work.stat().st_ino}{_NEW}"))
            return work
    work = target / f".{token}{_NEW}"
    work.mkdir()
    return work


def _flat(target: Path) -> bool:
    """Whether a folder contains only files and links, and may be replaced by another folder."""
    if os.path.ismount(target) or any(entry.is_dir(follow_symlinks=False) for entry in os.scandir(target)):
        return False
    try:
        return not target.samefile(".")
    except OSError:  # the current folder is gone
        return True


def _is_folder(path: Path) -> bool:
    """Whether it is a folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _commit(work: Path, target: Path, drop: Collection[str]) -> None:
    """Move the files of `work` into place."""
    if not os.path.lexists(target):
        try:
            os.rename(work, target)
            sync_folder(target.parent)
            return
        except OSError:
            if not target.is_dir():  # else it was created in the meantime
                raise
    names = {path.name for path in work.iterdir()}
    check_output_folder(target, {*names, *drop})
    if work.parent != target and _exchanged(work, target, {*names, *drop}):
        _discard(work, target, {*names, *drop})
        return
    for name in drop:
        (work / _DROP).mkdir(exist_ok=True)
        (work / _DROP / name).touch()
    whole = target / f".{secrets.token_hex(8)}{_WHOLE}"
    os.rename(work, whole)
    sync_folder(target)
    _finish(whole, target)


def _finish(whole: Path, target: Path) -> None:
    try:
        _move_in(whole, target)
    except OSError as error:
        raise HubMPQError(
            f"a save into {target} was interrupted ({why(error)}); make the folder writable and load it to finish the "
            "save"
        ) from error


def _move_in(whole: Path, target: Path) -> None:
    """Remove old files, then add new ones, so that they never coexist; may be repeated after being killed."""
    drop = whole / _DROP
    dropped = [drop / name for name in _DROPPED if _is_folder(drop) and (drop / name).exists()]
    new = [path for path in whole.iterdir() if path.name != _DROP]
    for path in (*dropped, *new):
        (target / path.name).unlink(missing_ok=True)
    for path in dropped:
        path.unlink()
    for path in new:
        os.replace(path, target / path.name)
    sync_folder(target)
    shutil.rmtree(whole, ignore_errors=True)


def _exchanged(work: Path, target: Path, names: Collection[str]) -> bool:
    """Link the files of `target` that stay into `work`, and swap the two folders.

    Args:
        work: The folder with the new files.
        target: The folder to replace.
        names: Files of `target` that do not stay.

    Returns:
        Whether this was possible; if not, `work` is unchanged.
    """
    linked = []
    try:
        for entry in os.scandir(target):
            if entry.name not in names:
                os.link(entry.path, work / entry.name, follow_symlinks=False)
                linked.append(work / entry.name)
        _take_mode(work, target)
        sync_folder(work)
        _exchange(work, target)
    except (OSError, NotImplementedError):
        for path in linked:
            path.unlink()
        return False
    sync_folder(target.parent)
    return True


def _take_mode(work: Path, target: Path) -> None:
    """Copy owner, mode and attributes of the old folder to the new one; raises PermissionError if not allowed."""
    before, now = target.stat(), work.stat()
    if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        os.chown(work, before.st_uid, before.st_gid)
    shutil.copystat(target, work)
    os.utime(work)


def _exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders in one step; raises OSError if the system or the file system cannot."""
    first, second = os.fsencode(one), os.fsencode(other)
    here = -100  # AT_FDCWD
    calls = {"linux": ("renameat2", (here, first, here, second, 2)), "darwin": ("renamex_np", (first, second, 2))}
    if sys.platform not in calls:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    name, arguments = calls[sys.platform]
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None or call(*arguments) != 0:
        number = ctypes.get_errno() or errno.ENOSYS
        raise OSError(number, os.strerror(number))


def _discard(old: Path, target: Path, names: Collection[str]) -> None:
    """Remove the old folder after the swap, moving over what was created in it since its files were linked.

    Args:
        old: The old folder.
        target: The new folder.
        names: Files of the old folder that are not moved.
    """
    with contextlib.suppress(OSError):
        for entry in os.scandir(old):
            new = target / entry.name
            if entry.name in names:
                continue
            if not os.path.lexists(new) or not os.path.samestat(entry.stat(follow_symlinks=False), new.lstat()):
                os.replace(entry.path, new)
        shutil.rmtree(old)  # only now, when no foreign files are left


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of their saves into `target`; the folders of running ones are locked."""
    beside = re.compile(re.escape(hidden_stem(target)) + r"[0-9a-f]{16}(?:-(\d+))?" + re.escape(_NEW))
    with contextlib.suppress(OSError):
        found = [p for p in target.parent.iterdir() if beside.fullmatch(p.name)]
        found += [p for p in target.glob(f".*{_NEW}") if _INSIDE.fullmatch(p.name)]
        for path in filter(_is_folder, found):
            with hold(path) as free:
                if free:
                    number = beside.fullmatch(path.name)
                    if number and number[1] and int(number[1]) != path.stat().st_ino:  # the old folder
                        _discard(path, target, {*_DROPPED, *os.listdir(target)})
                    else:
                        shutil.rmtree(path, ignore_errors=True)
