"""A folder's files are replaced together: killed at every step, on a full disk at every step, whatever folder it is."""

import errno
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from hub_mpq.core.files import CONFIG, INDICATORS, PACKED
from hub_mpq.core.output import check_output_file, check_output_folder
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.pack import atomic_folder as module
from hub_mpq.pack.atomic import write_atomic
from hub_mpq.pack.atomic_folder import atomic_folder, finish_interrupted

OLD = {CONFIG: "old", PACKED: "old", INDICATORS: "old"}
NEW = {CONFIG: "new", PACKED: "new", "tokenizer.json": "new"}
STEPS = ("mkdir", "rename", "replace", "fsync", "link", "unlink", "rmdir")


def save(folder, files, drop=()):
    with atomic_folder(folder, drop) as work:
        for name, text in files.items():
            (work / name).write_text(text)


def state(folder):
    """{name: text} of the model's files."""
    names = {*OLD, *NEW}
    return {name: (folder / name).read_text() for name in sorted(names) if (folder / name).is_file()}


def leftovers(folder):
    return [p.name for p in (*folder.parent.iterdir(), *folder.iterdir()) if "hub-mpq" in p.name]


def plain(root):
    """Files of the user's own, and nothing else beside the model."""
    folder = root / "out"
    save(folder, OLD)
    (folder / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("/etc/hostname")
    return folder


def with_folders(root):
    folder = plain(root)
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_text("mine")
    return folder


def users_own_is_there(folder):
    mine = [folder / "notes.txt", *([folder / "runs" / "events"] if folder.parent.name == "with_folders" else [])]
    return (folder / "link").is_symlink() and all(file.read_text() == "mine" for file in mine)


def stopped_at(step, stop):
    """Call `stop` before the `step`-th call of the system; returns what counts them."""
    count = iter(range(1, 10**6))

    def before(call):
        def wrapped(*args, **kwargs):
            if next(count) == step:
                stop()
            return call(*args, **kwargs)

        return wrapped

    for name in STEPS:
        setattr(os, name, before(getattr(os, name)))
    module._exchange = before(module._exchange)
    return count


def killed_save(folder, step):
    """A child that saves and is killed before its `step`-th call of the system; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            stopped_at(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save(folder, NEW, (INDICATORS,))
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("make", [plain, with_folders])
def test_killed_at_every_step_it_is_old_or_new_whole(tmp_path, make):
    step, seen = 0, set()
    while True:
        step += 1
        root = tmp_path / str(step) / make.__name__
        root.mkdir(parents=True)
        folder = make(root)
        killed = killed_save(folder, step)
        found = state(folder)
        assert users_own_is_there(folder)
        if make is plain:  # the folders exchange their names: nobody ever sees a part
            assert found in (OLD, NEW), step
        else:
            assert "old" not in found.values() or "new" not in found.values(), step
        finish_interrupted(folder)
        assert state(folder) in (OLD, NEW), step
        seen.add(state(folder)[CONFIG])
        save(folder, NEW, (INDICATORS,))
        assert state(folder) == NEW
        assert users_own_is_there(folder)
        assert leftovers(folder) == []
        if not killed:
            break
    assert seen == {"old", "new"}
    assert step > 10


def failing_save(folder, step):
    """(what a child's save ended with where its `step`-th call of the system fails, whether it came so far)."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"bug"
        try:

            def fail():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            count = stopped_at(step, fail)
            try:
                save(folder, NEW, (INDICATORS,))
                said = b"saved"
            except HubMPQError as error:
                said = str(error).encode()
            if next(count) <= step:
                said = b"over"
        finally:
            os.write(writes, said)
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        return pipe.read().decode()


@pytest.mark.parametrize("make", [plain, with_folders])
def test_where_the_disk_is_full_at_any_step_it_is_old_or_new_whole(tmp_path, make):
    failed = 0
    for step in range(1, 100):
        root = tmp_path / str(step) / make.__name__
        root.mkdir(parents=True)
        folder = make(root)
        said = failing_save(folder, step)
        assert said != "bug"
        if said == "over":
            break
        failed += said != "saved"
        finish_interrupted(folder)
        assert users_own_is_there(folder)
        done = said == "saved" or "to finish the save" in said
        assert state(folder) == (NEW if done else OLD), (step, said)
        save(folder, NEW, (INDICATORS,))
        assert leftovers(folder) == []
    assert failed > 3
    assert step > 10


def full():
    yield b"x"
    raise OSError(errno.ENOSPC, "full")


def test_a_write_that_fails_leaves_the_old_files_alone(tmp_path):
    folder = plain(tmp_path)

    def write(error):
        with atomic_folder(folder) as work:
            (work / CONFIG).write_text("new")
            raise error

    with pytest.raises(ZeroDivisionError):
        write(ZeroDivisionError())
    with pytest.raises(HubMPQError, match=r"cannot write .*out: the disk is full"):
        write(OSError(errno.ENOSPC, "full"))
    with pytest.raises(HubMPQError, match=f"cannot write {folder}/{PACKED}: "), atomic_folder(folder) as work:
        write_atomic(work / PACKED, full())
    assert state(folder) == OLD
    assert leftovers(folder) == []


@pytest.fixture
def mounted(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=False)


def test_a_mount_point(mounted):
    save(mounted, OLD)
    save(mounted, NEW, (INDICATORS,))
    assert state(mounted) == NEW
    assert leftovers(mounted) == []


def test_the_current_folder_stays_the_same_one(tmp_path, monkeypatch):
    folder = plain(tmp_path)
    monkeypatch.chdir(folder)
    before = folder.stat().st_ino
    save(Path("."), NEW, (INDICATORS,))
    assert state(Path(".")) == NEW
    assert folder.stat().st_ino == before


def test_a_current_folder_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for check in (check_output_folder, check_output_file):
        with pytest.raises(InvalidArgument, match="the current folder no longer exists"):
            check("out")
    save(tmp_path / "out", NEW)
    assert state(tmp_path / "out") == NEW


def test_a_link_to_a_folder_stays(tmp_path):
    folder = plain(tmp_path)
    (tmp_path / "latest").symlink_to("out")
    save(tmp_path / "latest", NEW, (INDICATORS,))
    assert (tmp_path / "latest").is_symlink()
    assert state(folder) == NEW


def test_links_at_the_places_of_files_are_not_written_through(tmp_path):
    for make in (plain, with_folders):
        (tmp_path / make.__name__).mkdir()
        folder, other = make(tmp_path / make.__name__), tmp_path / "other"
        other.write_text("another's")
        (folder / CONFIG).unlink()
        (folder / CONFIG).symlink_to(other)
        save(folder, NEW, (INDICATORS,))
        assert other.read_text() == "another's"
        assert not (folder / CONFIG).is_symlink()


def test_mode_and_hard_links_of_what_stays(tmp_path):
    folder = plain(tmp_path)
    folder.chmod(0o2770)
    file = (folder / "notes.txt").stat().st_ino
    save(folder, NEW, (INDICATORS,))
    assert folder.stat().st_mode & 0o7777 == 0o2770
    assert (folder / "notes.txt").stat().st_ino == file
    assert (folder / "notes.txt").stat().st_nlink == 1


def test_what_somebody_writes_meanwhile_comes_along(tmp_path, monkeypatch):
    folder, exchange = plain(tmp_path), module._exchange

    def others(work, target):
        (target / "late.txt").write_text("mine")
        (target / "notes.txt").unlink()
        (target / "notes.txt").write_text("mine, newer")
        exchange(work, target)

    monkeypatch.setattr(module, "_exchange", others)
    save(folder, NEW, (INDICATORS,))
    assert state(folder) == NEW
    assert (folder / "late.txt").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine, newer"
    assert leftovers(folder) == []


def test_two_at_once(tmp_path):
    """Whoever reads finds the files of one of them, and the folders of the other are left alone."""
    folder = plain(tmp_path)
    failures = []

    def write(text):
        try:
            for _ in range(30):
                save(folder, {CONFIG: text, PACKED: text})
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        handle = os.open(folder, os.O_RDONLY)  # one folder, whatever its name leads to by then
        try:
            found = set()
            for name in (CONFIG, PACKED):
                with open(os.open(name, os.O_RDONLY, dir_fd=handle)) as file:
                    found.add(file.read())
            assert len(found) == 1
        except FileNotFoundError:  # the old one, which is being removed
            pass
        finally:
            os.close(handle)
    assert failures == []
    assert leftovers(folder) == []
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_that_another_takes_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Between its making and its locking."""
    fcntl = pytest.importorskip("fcntl")
    folder, make, removers = plain(tmp_path), module._make, []

    def taken(target):
        work = make(target)
        if not removers:
            handle = os.open(work, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            removers.append(threading.Timer(0.2, lambda: (shutil.rmtree(work), os.close(handle))))
            removers[0].start()
        return work

    monkeypatch.setattr(module, "_make", taken)
    with atomic_folder(folder, (INDICATORS,)) as work:
        removers[0].join()
        for name, text in NEW.items():
            (work / name).write_text(text)
    assert state(folder) == NEW


def test_links_in_the_place_of_leftovers_are_left_alone(tmp_path):
    folder, other = plain(tmp_path), tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    for name in (".0123456789abcdef.hub-mpq-whole", ".0123456789abcdef.hub-mpq-new"):
        (folder / name).symlink_to(other)
    (tmp_path / ".out.0123456789abcdef-1.hub-mpq-new").symlink_to(other)
    assert not finish_interrupted(folder)
    save(folder, NEW, (INDICATORS,))
    assert (other / "precious").read_text() == "x"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.symlink_to("nowhere"), "is a broken link"),
        (lambda p: p.symlink_to(p), "is a broken link"),
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: (p / CONFIG).mkdir(parents=True), "must be a file but is a folder"),
    ],
    ids=["dangling", "loop", "file", "a folder for a file"],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, make, words):
    make(tmp_path / "out")
    with pytest.raises(InvalidArgument, match=words):
        check_output_folder(tmp_path / "out", (CONFIG,))
    with pytest.raises(InvalidArgument), atomic_folder(tmp_path / "out") as work:
        (work / CONFIG).write_text("x")


def test_paths_that_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for check in (check_output_folder, check_output_file):
        for path in ("file/x", "link/x", "x" * 300, "a\0b"):
            with pytest.raises(InvalidArgument):
                check(tmp_path / path)
    for path in (".", "link", "pipe"):
        with pytest.raises(InvalidArgument):
            check_output_file(tmp_path / path)
    check_output_file(tmp_path / "a" / "b" / "c")
    check_output_folder(tmp_path / "a" / "b" / "c")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for check in (check_output_folder, check_output_file):
        with pytest.raises(InvalidArgument, match="no permission to write"):
            check(tmp_path / "new" / "er")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "pipe"]


def test_a_folder_whose_parent_cannot_be_written():
    """Root may write everywhere, so that a child that is somebody else does it."""
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder = plain(parent)
        if os.geteuid() == 0:
            for path in (folder, *folder.iterdir()):
                os.chown(path, 65534, 65534, follow_symlinks=False)
        parent.chmod(0o555)
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                save(folder, NEW, (INDICATORS,))
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert state(folder) == NEW
        assert users_own_is_there(folder)
        assert leftovers(folder) == []
    finally:
        parent.chmod(0o755)
        shutil.rmtree(parent)
