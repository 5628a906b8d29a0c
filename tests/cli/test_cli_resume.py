"""Ctrl-C leaves a state to go on from, and going on gives what was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_toys import LOADING, MODEL, UNTESTED

from hub_mpq.pack import read_indicators

PRESSED = """
import os, signal, sys
from hub_mpq.cli import main
from hub_mpq.train.checkpoint import Checkpoints

write, pressed = Checkpoints.save, []

def save(self, step):
    write(self, step)
    if self.folder.name.startswith("finetune") and not pressed:
        pressed.append(step)
        os.killpg(0, signal.SIGINT)

Checkpoints.save = save
main()
"""


def command(folder, out):
    args = ["quantize", *MODEL, "--data", folder, "--bitops", "W4A4", "--output", out]
    args += ["--indicator-steps", "2", "--steps", "30", "--checkpoint-every", "10"]
    return [*map(str, args), "--batch-size", "8", "--workers", "1"]


def interrupted(args) -> subprocess.CompletedProcess:
    """Run; Ctrl-C reaches the process group, workers included, behind the first state of the fine-tuning.

    The run itself sends it, whatever the speed of the machine, and while the training loop handles signals: elsewhere
    an interrupt raises wherever it comes, and Python drops one that comes in a finalizer.
    """
    return subprocess.run(
        [sys.executable, "-c", PRESSED, *args], capture_output=True, text=True, start_new_session=True
    )


def test_ctrl_c_and_resume(run, folder, tmp_path):
    out, states = tmp_path / "out", tmp_path / "out.checkpoints"
    args = command(folder, out)
    stopped = interrupted([*args, "--json"])
    assert stopped.returncode == 130
    assert stopped.stdout == ""
    first, hint = (line for line in stopped.stderr.splitlines() if not line.startswith(UNTESTED))
    assert first == "hub-mpq: 1 process, device cpu"
    assert "--resume" in hint
    assert not out.exists()

    again = run(*args)
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    other = run(*args, "--resume", "--seed", "3")
    assert other.exit_code == 2
    assert "different options (seed)" in other.stderr

    resumed = run(*args, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert f"hub-mpq: resuming from {states / 'finetune-'}" in resumed.stderr
    assert "step-000000" in resumed.stderr
    assert not states.exists()
    straight = run(*command(folder, tmp_path / "straight"), "--json")
    assert straight.exit_code == 0
    # indicators were trained in both; the rest of the run is the same to the byte
    packed = [(folder / "model.mpq.safetensors").read_bytes() for folder in (out, tmp_path / "straight")]
    assert packed[0] == packed[1]
    assert json.loads(resumed.stdout)["policy"] == json.loads(straight.stdout)["policy"]


def test_resume_with_nothing_to_resume_starts(run, folder, tmp_path):
    args = ["indicators", *MODEL, *LOADING, "--data", folder, "--output", tmp_path / "i.safetensors", "--steps", "1"]
    result = run(*args, "--resume")
    assert result.exit_code == 0
    assert "nothing to resume" in result.stderr
    assert os.listdir(tmp_path) == ["i.safetensors"]


def test_killed_after_its_output_was_written_it_ends_the_same(run, folder, tmp_path, monkeypatch):
    from hub_mpq.cli.resume import Run
    from hub_mpq.pack import read_indicators

    out, states = tmp_path / "i.safetensors", tmp_path / "i.safetensors.checkpoints"
    args = [
        "indicators",
        *MODEL,
        *LOADING,
        "--data",
        folder,
        "--output",
        out,
        "--steps",
        "3",
        "--checkpoint-every",
        "2",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "__exit__", lambda *_: None)  # the moment between the output and the removal of the states
        assert run(*args).exit_code == 0
    first = read_indicators(out)
    assert states.is_dir()
    # of a removal cut short
    (tmp_path / ".i.safetensors.checkpoints.0123456789abcdef.hub-mpq-new" / "indicators").mkdir(parents=True)
    assert run(*args).exit_code == 2
    assert run(*args, "--resume").exit_code == 0
    assert read_indicators(out).weight == first.weight
    assert os.listdir(tmp_path) == ["i.safetensors"]


def test_a_failure_keeps_states_and_removes_empty_folders(tmp_path):
    from hub_mpq.cli.resume import Run
    from hub_mpq.errors import TrainingDiverged

    def fail(write):
        run = Run(tmp_path / "out", {"seed": 0}, resume=False)
        try:
            with run:
                if write:
                    (run.folder / "finetune" / "step-00000004").mkdir(parents=True)
                raise TrainingDiverged(7, float("nan"), None)
        except TrainingDiverged:
            return run.folder.exists()

    assert fail(write=False) is False
    assert fail(write=True) is True


def test_nan_stops_with_the_step(run, folder, tmp_path, monkeypatch):
    from hub_mpq.train import Finetune

    plain = Finetune.loss
    monkeypatch.setattr(Finetune, "loss", lambda self, model, batch: plain(self, model, batch) * float("nan"))
    args = ["finetune", *MODEL, *LOADING, "--data", folder, "--policy", "W4A4", "--output", tmp_path / "out"]
    result = run(*args, "--steps", "4")
    assert result.exit_code == 2
    assert "step 0" in result.stderr
    assert "loss" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_process_that_ends_while_the_main_one_removes_the_states(tmp_path, monkeypatch):
    """Of several processes only the main one removes the folder, at a moment that the others do not know."""
    from hub_mpq.cli import resume

    run = resume.Run(tmp_path / "out", {"seed": 0}, resume=False)

    def removed_before_it_is_listed(folder, pattern):
        shutil.rmtree(folder)
        return os.scandir(folder)  # raises, as a listing does that was about to begin

    with run:
        monkeypatch.setattr(resume, "is_main", lambda: False)
        monkeypatch.setattr(Path, "glob", removed_before_it_is_listed)
    assert not run.folder.exists()


@pytest.mark.parametrize("strategy", ["limpq", "dq"])
def test_a_run_that_stopped_while_it_fine_tuned_searches_no_more(run, folder, tmp_path, monkeypatch, strategy):
    """The scores lie beside the states, whatever strategy made them, until the run is done."""
    args = ["quantize", *MODEL, "--data", folder, "--bitops", "W3A3", "--strategy", strategy, *LOADING]
    args += ["--indicator-steps", "1", "--steps", "2", "--output", tmp_path / "out"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hub_mpq.model.finetune", stop)
        stopped = run(*args)
    assert (stopped.exit_code, "--resume" in stopped.stderr) == (130, True)
    kept = read_indicators(next((tmp_path / "out.checkpoints").glob("scores-*.safetensors")))
    assert kept.strategy == strategy
    with monkeypatch.context() as patch:
        patch.setattr("hub_mpq.model.train_scores", None)
        done = run(*args, "--resume")
    assert done.exit_code == 0, done.stderr
    assert read_indicators(tmp_path / "out" / "indicators.safetensors") == kept
    assert not (tmp_path / "out.checkpoints").exists()
