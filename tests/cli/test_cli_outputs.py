"""Every output is checked before the work: nothing is loaded, asked of the network or left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_toys import LOADING, MODEL, SKELETON

TRAINING = [*LOADING, "--bitops", "W4A4"]
COMMANDS = {
    "quantize": ["quantize", *MODEL, *TRAINING, "-o"],
    "quantize --plot": ["quantize", *MODEL, *TRAINING, "-o", "new", "--plot"],
    "quantize --log-with": ["quantize", *MODEL, *TRAINING, "--log-with", "jsonl", "-o"],
    "finetune": ["finetune", *MODEL, "--policy", "W4A4", "--data", "images", "-o"],
    "finetune --plot": ["finetune", *MODEL, "--policy", "W4A4", "--data", "images", "-o", "new", "--plot"],
    "indicators": ["indicators", *MODEL, "--data", "images", "-o"],
    "indicators --plot": ["indicators", *MODEL, "--data", "images", "-o", "new.safetensors", "--plot"],
    "search --plot": ["search", *SKELETON, "--bitops", "W4A4", "--plot"],
    "pareto --plot": ["pareto", *SKELETON, "--plot"],
    "bench": ["bench", *MODEL, "--runtime", "torch", "-o"],
    "pull": ["pull", "me/model", "-o"],
    "export": ["export", "folder", "-o"],
    "demo": ["demo", "-o"],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, where nothing can be loaded or fetched."""
    import hub_mpq.cli.models
    import hub_mpq.demo
    import hub_mpq.hub.pull
    import hub_mpq.model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_mpq.cli.models, "load", None)
    monkeypatch.setattr(hub_mpq.hub.pull, "fetch", None)
    monkeypatch.setattr(hub_mpq.demo, "Demo", None)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_link_that_leads_nowhere(run, here, command):
    name = "out.png" if command[-1] == "--plot" else "out"
    logs = name + ".logs" if "--log-with" in command else name
    Path(logs).symlink_to("nowhere")
    refused = run(*command, name)
    assert refused.exit_code == 2
    assert refused.stderr == f"hub-mpq: {logs} is a broken link; remove it or choose another output\n"
    assert os.listdir(here) == [logs]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_folder_below_a_file(run, here, command):
    Path("file").write_text("mine")
    refused = run(*command, "file/out.png")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("hub-mpq: ")
    assert "file is a file" in refused.stderr
    assert os.listdir(here) == ["file"]


@pytest.mark.parametrize("made", ["file", "folder"])
def test_what_lies_where_the_states_go_is_not_of_ours_to_remove(run, here, made):
    states = Path("out.checkpoints")
    if made == "file":
        states.write_text("mine")
    else:
        (states / "mine").mkdir(parents=True)
    for more in ([], ["--resume"], ["--overwrite"]):
        refused = run(*COMMANDS["quantize"], "out", *more)
        assert refused.exit_code == 2
        assert "out.checkpoints is" in refused.stderr
    assert os.listdir(here) == ["out.checkpoints"]
    assert made == "file" or os.listdir(states) == ["mine"]


def test_a_folder_in_the_place_of_a_file_of_the_model(run, here, packed):
    import shutil

    shutil.copytree(packed, "out")
    Path("out/config.json").unlink()
    Path("out/config.json").mkdir()
    refused = run(*COMMANDS["quantize"], "out", "--overwrite")
    assert refused.exit_code == 2
    assert "out/config.json must be a file but is a folder" in refused.stderr
