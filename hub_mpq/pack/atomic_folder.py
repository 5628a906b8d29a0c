"""Replace files of a folder together: whoever looks finds the old ones or the new ones, wherever a process was killed.

The new files are written into a hidden folder beside the target. If the target holds nothing but files, those that stay
are linked into it and the two folders exchange their names, in one step of the file system. Elsewhere (a mount point,
the current folder, a folder with folders in it, a file system that cannot exchange) the hidden folder lies inside the
target: it is renamed once it is whole, and from then on its files go to their places, now or, if the process is killed,
in `finish_interrupted`.
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
"""What a new version may leave out of an old one's files."""


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str], drop: Collection[str] = ()) -> Iterator[Path]:
    """A folder to write new files of `target` into: at the end of the block all are in their places, or, on an error,
    none is.

    Everything else in `target` stays. What processes that were killed left of their own is removed. Links at the places
    of new files are replaced, not followed.

    Args:
        target: The folder, made if it is not there. A link to a folder stays and stands for that folder.
        drop: Names of old files that the new version lacks, of INDICATORS and FLOAT_COPY.

    Raises:
        InvalidArgument: The folder cannot be written.
        HubMPQError: The disk refuses.
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
        raise HubMPQError(f"{shown} cannot be written: {why(error)}; what was there before is untouched") from error
    except HubMPQError as error:
        if work is None or str(work) not in str(error):
            raise
        raise HubMPQError(str(error).replace(str(work), str(shown))) from error  # the hidden folder is nobody's concern


def remove_folder(folder: Path) -> None:
    """Remove a folder that is hub-mpq's own, under another name first: nobody finds a half of it.

    What a killed process leaves of it, the next call for this path, or the next `atomic_folder`, removes.
    """
    _remove_leftovers(folder)
    gone = folder.with_name(f"{hidden_stem(folder)}{secrets.token_hex(8)}{_NEW}")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def finish_interrupted(target: Path) -> bool:
    """Finish what a killed process had begun to put into its places; whether there was anything.

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
            if _is_folder(whole):  # else who held it has finished
                _finish(whole, target)
                finished = True
    return finished


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A new folder for the new files, locked; gone afterwards under this name, whatever it holds by then."""
    while True:
        work = _make(target)
        with hold(work, wait=True):
            if not work.exists():  # taken for a leftover before it was locked
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
            with contextlib.suppress(FileNotFoundError):  # taken for a leftover: there is none under this name then
                # whoever finds it later knows by the number whether the folders were exchanged
                return work.rename(work.with_name(f"{hidden_stem(target)}{token}-{work.stat().st_ino}{_NEW}"))
            return work
    work = target / f".{token}{_NEW}"
    work.mkdir()
    return work


def _flat(target: Path) -> bool:
    """Whether a folder holds nothing but files and links, and nobody minds that it becomes another one."""
    if os.path.ismount(target) or any(entry.is_dir(follow_symlinks=False) for entry in os.scandir(target)):
        return False
    try:
        return not target.samefile(".")
    except OSError:  # the current folder is gone
        return True


def _is_folder(path: Path) -> bool:
    """Whether it is a folder and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _commit(work: Path, target: Path, drop: Collection[str]) -> None:
    """Put the files of `work` into their places."""
    if not os.path.lexists(target):
        try:
            os.rename(work, target)
            sync_folder(target.parent)
            return
        except OSError:
            if not target.is_dir():  # else somebody has made it meanwhile
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
            f"a save into {target} was interrupted ({why(error)}); load it where it can be written, which finishes it"
        ) from error


def _move_in(whole: Path, target: Path) -> None:
    """Old files out, new ones in. Never an old one beside a new one; may be called again wherever it was killed."""
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
    """Link what stays in `target` into `work` and exchange the two; False, with `work` as it was, where that cannot be.

    `names`: what does not stay.
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
    """Owner, mode and attributes of the old folder for the new one; PermissionError where they cannot be given."""
    before, now = target.stat(), work.stat()
    if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        os.chown(work, before.st_uid, before.st_gid)
    shutil.copystat(target, work)
    os.utime(work)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders have each other's names, in one step; OSError where the system or the file system cannot."""
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
    """Empty the folder that was exchanged. What somebody has made in it since its files were linked comes over.

    `names`: what does not.
    """
    with contextlib.suppress(OSError):
        for entry in os.scandir(old):
            new = target / entry.name
            if entry.name in names:
                continue
            if not os.path.lexists(new) or not os.path.samestat(entry.stat(follow_symlinks=False), new.lstat()):
                os.replace(entry.path, new)
        shutil.rmtree(old)  # only now that nothing of others is left there


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of their saves into `target`; the folders of living ones are locked."""
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
