"""SIGKILL at 20 random moments of a real run, the writing of states among them, changes nothing of its end."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
from cli_toys import MODEL, steps

from hub_mpq.pack import read_indicators

KILLS, STEPS = 20, 60


def command(folder, out):
    args = ["indicators", *MODEL, "--data", folder, "--output", out, "--steps", STEPS, "--checkpoint-every", 1]
    return [str(a) for a in (*args, "--candidates", "2,4", "--batch-size", "4", "--workers", "0", "--resume")]


def run(args, log, flushes=None, saves=None):
    """The command, in a process of its own that has its imports already.

    `flushes`: SIGKILL after so many files of states have been flushed, which is while a state is being written.
    `saves`: SIGKILL after so many states have been written.
    """
    import sys

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)

    def killing(plain, times):
        left = iter(range(times - 1))

        def last(*args):
            plain(*args)
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        return last

    if flushes is not None:
        os.fsync = killing(os.fsync, flushes)
    if saves is not None:
        from hub_mpq.train.checkpoint import Checkpoints

        Checkpoints.save = killing(Checkpoints.save, saves)
    sys.argv = ["hub-mpq", *args]
    from hub_mpq.cli import main

    main()


@pytest.fixture(scope="module")
def start():
    """Starts a run; its process is forked from one that has imported what a run needs, which saves seconds a start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "accelerate", "timm", "hub_mpq.cli", "hub_mpq.model", "torch._dynamo"])

    def begin(args, log, **when):
        process = context.Process(target=run, args=(args, str(log)), kwargs=when)
        process.start()
        return process

    return begin


def kill(begin, args, log, states, rng):
    """SIGKILL at a random moment: before, in or after the training, or while a state is being written.

    The latter by the run itself, since a busy machine can write a whole state between two looks from outside.
    """

    def at_step():
        return max((int(name[-8:]) for name in steps(states)), default=0)

    if rng.random() < 0.5:
        process = begin(args, log, flushes=rng.randrange(1, 40))
    else:
        wait, begun = rng.choice([0, 1, 2, 3, 4]), at_step()
        process = begin(args, log)
        while process.is_alive() and at_step() - begun < wait:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_20_times_and_resumed_the_indicators_are_equal_to_the_bit(start, folder, tmp_path):
    log, out, straight = tmp_path / "log", tmp_path / "out.safetensors", tmp_path / "straight.safetensors"
    states, rng = tmp_path / "out.safetensors.checkpoints", random.Random(0)
    whole = start(command(folder, straight), log)
    ends, kills, torn, met = [], 0, 0, set()
    while kills < KILLS:
        assert len(ends) < KILLS, "the runs are over before they can be killed"
        killed = kill(start, command(folder, out), log, states, rng)
        kills += killed
        torn += any(states.glob("*/partial-*"))
        met |= steps(states)
        if not killed:  # it was faster, and the next chain begins
            assert out.is_file(), log.read_text()[-3000:]
            ends.append(read_indicators(out))
            out.unlink()
    last = start(command(folder, out), log)
    for process in (last, whole):
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]
    ends.append(read_indicators(out))
    assert torn >= 3, "no state was being written when the runs were killed"
    assert len(met) >= 5, "the runs were killed at one place only"
    expected = read_indicators(straight)
    for found in ends:
        assert found.weight == expected.weight
        assert found.activation == expected.activation
        for key in ("steps", "samples", "epoch_loss"):
            assert found.provenance[key] == expected.provenance[key]
    assert not states.exists()
    print(f"{kills} kills, {torn} of them while a state was written, at {len(met)} steps, {len(ends)} ends")


def quantize(folder, out):
    args = ["quantize", *MODEL, "--bitops", "W3A3", "--data", folder, "--output", out, "--checkpoint-every", 1]
    args += ["--indicator-steps", 6, "--steps", 6, "--no-validate", "--candidates", "2,4", "--batch-size", 4]
    return [str(a) for a in (*args, "--workers", "0", "--resume")]


def contents(folder):
    """The bytes of each file; of the indicators, which tell the seconds that they took, what they are."""
    scores = read_indicators(folder / "indicators.safetensors")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "indicators.safetensors"}
    return files, scores.weight, scores.activation


def test_killed_20_times_and_resumed_a_packed_folder_is_equal_to_the_byte(start, folder, tmp_path):
    log, out, straight = tmp_path / "log", tmp_path / "out", tmp_path / "straight"
    states, rng = tmp_path / "out.checkpoints", random.Random(1)
    whole = start(quantize(folder, straight), log)
    whole.join()
    assert whole.exitcode == 0, log.read_text()[-3000:]
    expected, ends, kills, met = contents(straight), 0, 0, set()
    while kills < KILLS:
        assert ends < KILLS, "the runs are over before they can be killed"
        killed = kill(start, quantize(folder, out), log, states, rng)
        kills += killed
        met |= {(path.parent.name.partition("-")[0], path.name) for path in states.glob("*/step-*")}
        if out.exists():  # whole, whenever the run was killed
            assert contents(out) == expected
        if not killed:
            assert contents(out) == expected, log.read_text()[-3000:]
            shutil.rmtree(out)
            ends += 1
    last = start(quantize(folder, out), log)
    last.join()
    assert last.exitcode == 0, log.read_text()[-3000:]
    assert contents(out) == expected
    assert {stage for stage, _ in met} == {"indicators", "finetune"}, "one of the trainings was never killed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out", "straight"], "litter"
    print(f"{kills} kills, at {len(met)} states, {ends + 1} ends")


def limited(args, log):
    """The command where no file may grow beyond 16 KB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
    run(args, log)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 7 MB: one state of the toy (4.6 MB) has its place there, not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=False)


def refused_for_space(process, log, folder):
    """It ends with one sentence, and the last good state stays alone."""
    process.join()
    lines = log.read_text().splitlines()
    assert process.exitcode == 2, lines
    assert "cannot be written" in lines[-1], lines
    assert "Traceback" not in "".join(lines)
    (good,) = folder.glob("*/*-*")
    assert good.name.startswith("step-")
    assert str(good) in lines[-1]


def test_files_that_cannot_grow_keep_the_last_good_state(start, folder, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out.safetensors"
    states = tmp_path / "out.safetensors.checkpoints"
    start(command(folder, out), log, saves=1).join()
    process = multiprocessing.get_context("forkserver").Process(target=limited, args=(command(folder, out), str(log)))
    process.start()
    refused_for_space(process, log, states)


def test_a_full_disk_keeps_the_last_good_state(start, folder, tmp_path, small_disk):
    log, out = tmp_path / "log", small_disk / "out.safetensors"
    refused_for_space(start(command(folder, out), log), log, small_disk / "out.safetensors.checkpoints")
