"""A write happens whole or not at all: full disks, killed processes, two writers."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_toys import same, toy

from hub_mpq.errors import HubMPQError
from hub_mpq.pack import atomic, read_packed, write_packed

HERE = Path(__file__).parent


@pytest.fixture
def whole(packed):
    """Checks that the old file is there to the byte and nothing else."""
    path = packed[0]
    before = path.read_bytes()

    def check():
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    return path, check


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(whole, monkeypatch, call):
    path, check = whole

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "write":
        real = open

        def opened(*args, **kwargs):
            file = real(*args, **kwargs)

            class Full:
                write = staticmethod(fail)
                __enter__ = lambda self: self  # noqa: E731
                __exit__ = lambda self, *_: file.close()  # noqa: E731

            return Full()

        monkeypatch.setattr(atomic, "open", opened, raising=False)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(HubMPQError, match="the disk is full; existing files are unchanged"):
        write_packed(path, *toy(seed=1))
    monkeypatch.undo()
    check()


def test_a_limit_of_the_kernel_leaves_the_old_file(whole):
    """A real refusal, in the middle of the file: the kernel lets a file grow to 1 MiB and no further."""
    path, check = whole
    tensors, manifest = toy()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(HubMPQError, match="File too large"):
            write_packed(path, {**tensors, "blob": torch.ones(2**20)}, manifest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check()


def test_an_interrupt_leaves_the_old_file(whole, monkeypatch):
    path, check = whole
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_packed(path, *toy(seed=1))
    check()


def test_no_such_folder(tmp_path):
    with pytest.raises(HubMPQError, match=r"cannot write .*No such file"):
        write_packed(tmp_path / "nowhere" / "m", *toy())
    (tmp_path / "m").mkdir()
    with pytest.raises(HubMPQError, match=r"cannot write .*directory"):
        write_packed(tmp_path / "m", *toy())
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


def test_a_link_is_replaced_not_followed(tmp_path):
    """As in the Hub's cache, where the names of a snapshot link to blobs that others share."""
    write_packed(tmp_path / "blob", *toy())
    before = (tmp_path / "blob").read_bytes()
    (tmp_path / "m").symlink_to(tmp_path / "blob")
    write_packed(tmp_path / "m", *toy(seed=1))
    assert (tmp_path / "blob").read_bytes() == before
    assert not (tmp_path / "m").is_symlink()


def test_the_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_packed(tmp_path / "m", *toy())
    finally:
        os.umask(before)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from packed_toys import toy
from hub_mpq.pack import write_packed
path, seed, times = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
real = os.fsync
def stall(handle):
    real(handle)
    print('written', flush=True)
    signal.pause()
if not times:
    os.fsync = stall
    write_packed(path, *toy(seed=seed))
print('ready', flush=True)
for _ in range(times):
    write_packed(path, *toy(seed=seed))
"""


def child(path, seed, times):
    call = [sys.executable, "-c", CHILD, str(HERE), str(path), str(seed), str(times)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_killed_writer_leaves_the_old_file(packed):
    path, tensors, _ = packed
    writer = child(path, 1, 0)
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert same(read_packed(path)[0], tensors)
    left = [p for p in path.parent.iterdir() if p != path]
    assert all(p.name.startswith(".") and p.suffix == ".tmp" for p in left)
    write_packed(path, *toy(seed=2))
    assert same(read_packed(path)[0], toy(seed=2)[0])
    assert list(path.parent.iterdir()) == [path], "what the killed one left is gone"


def test_two_writers_and_a_reader(packed):
    """Whatever the reader opens is one writer's file, whole; so it is after one of them is killed at no set moment."""
    path = packed[0]
    models = [toy(seed=s)[0] for s in range(3)]
    writers = [child(path, 1, 15), child(path, 2, 100_000)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    reads = 0
    while writers[0].poll() is None or reads < 50:
        found = read_packed(path)[0]
        assert any(same(found, model) for model in models)
        reads += 1
    writers[1].kill()
    for writer in writers:
        writer.communicate()
    assert writers[0].returncode == 0
    found = read_packed(path)[0]
    assert any(same(found, model) for model in models)
