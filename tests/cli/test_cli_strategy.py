"""quantize --strategy: a built-in one, one that trains, one from a file of the user's own, and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_toys import LOADING, MODEL

from hub_mpq import HubMPQ

OWN = Path(__file__).parents[2] / "examples" / "new_strategy.py"


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("mse", []), ("dq", ["--indicator-steps", "2"]), (f"{OWN}:fan-out", ["--strategy-option", "power=1.0"])],
    ids=["mse", "dq", "own"],
)
def test_a_strategy_ends_in_a_policy_within_the_budget(run, folder, tmp_path, strategy, options):
    out = tmp_path / "out"
    args = ["quantize", *MODEL, *LOADING, "--data", folder, "--bitops", "W3A3", "--output", out]
    result = run(*args, "--strategy", strategy, *options, "--steps", "1", "--json")
    assert result.exit_code == 0, result.stderr
    tree = json.loads(result.stdout)
    assert tree["search"]["strategy"] == strategy.rpartition(":")[2]
    assert 0 < tree["usage"]["bitops"] <= HubMPQ.from_pretrained(str(out)).usage("W3A3")["bitops"]
    assert (out / "model.mpq.safetensors").is_file()


def test_dq_needs_no_budget_and_ebs_does(run, folder, tmp_path):
    args = ["quantize", *MODEL, *LOADING, "--data", folder, "--steps", "0", "--indicator-steps", "1", "--json"]
    result = run(*args, "--strategy", "dq", "--output", tmp_path / "dq")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["policy"]
    result = run(*args, "--strategy", "ebs", "--output", tmp_path / "ebs")
    assert result.exit_code == 2
    assert "no budget" in result.stderr
    assert not (tmp_path / "ebs").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--strategy", "magic"], "magic"),
        (["--strategy", "mse", "--strategy-option", "sharpness=2"], "sharpness"),
        (["--strategy", "nowhere.py:mine"], "nowhere.py"),
        (["--strategy-option", "unifrom=false"], "unifrom"),
    ],
)
def test_a_wrong_strategy_is_one_sentence_and_writes_nothing(run, folder, tmp_path, args, words):
    out = tmp_path / "out"
    result = run("quantize", *MODEL, *LOADING, "--data", folder, "--bitops", "W3A3", "--output", out, *args)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()
