"""hub-mpq bench, and searches within the table that it writes."""

from __future__ import annotations

import json

import pytest
from cli_toys import LOADING, MODEL, SKELETON

from hub_mpq.core import runtimes

pytestmark = pytest.mark.skipif(runtimes.get("onednn").available() is not None, reason="no onednn here")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of the tiny model, made by the command itself."""
    from typer.testing import CliRunner

    from hub_mpq.cli import app

    path = tmp_path_factory.mktemp("table") / "table.json"
    result = CliRunner().invoke(app, ["bench", *MODEL, "--runtime", "onednn", "-o", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    for words in ("layer1.0.conv1", "quantized", "outside these layers", "whole model", f"saved {path}"):
        assert words in result.stdout
    return path


def test_a_table_as_json(run, table, tmp_path):
    result = run("bench", *MODEL, "--runtime", "onednn", "--batch-size", 2, "--candidates", "2,4", "--json")
    assert "--candidates has no effect: onednn computes all bit-widths with one kernel" in result.stderr
    tree = json.loads(result.stdout)
    kept = json.loads(table.read_text())
    assert set(tree) == set(kept)
    assert (tree["batch_size"], kept["batch_size"], tree["input_shape"]) == (2, 1, [3, 32, 32])
    assert {name: set(row) for name, row in tree["entries"].items()} == {
        name: set(row) for name, row in kept["entries"].items()
    }


def test_a_table_that_is_there_is_not_overwritten(run, table):
    before = table.read_bytes()
    result = run("bench", *MODEL, "--runtime", "onednn", "-o", table)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert table.read_bytes() == before


def test_an_unknown_runtime_costs_no_loading(run):
    result = run("bench", "nothing/there", "--runtime", "none")
    assert result.exit_code == 2
    assert "unknown runtime 'none'" in result.stderr


def test_a_packed_folder_against_float(run, packed):
    result = run("bench", packed, "--runtime", "onednn", "--json")
    assert result.exit_code == 0, result.stderr
    tree = json.loads(result.stdout)
    for of in ("runtime", "float"):
        assert set(tree[of]) == {"seconds", "spread", "counts"}
    assert tree["certificate"]["exact"] is True
    assert tree["integer_nbytes"] < 0.5 * tree["float_nbytes"] or not tree["layers"]["integer"]
    layers = {*tree["layers"]["integer"], *tree["layers"]["float"]}
    assert layers == {row["name"] for row in json.loads(run("inspect", packed, "--json").stdout)["layers"]}
    text = run("bench", packed, "--runtime", "torch").stdout
    assert "0 layers compute in integers" in text
    assert "float: fc (the reference computes in float)" in text


def test_unsteady_timing_is_told(run, packed, monkeypatch):
    from hub_mpq.runtime import Timing

    words = "timing is unsteady; the machine is busy"
    for spread, told in ((0.002, True), (0.0005, False)):
        found = [Timing(0.001, spread, 9)] * 2
        monkeypatch.setattr("hub_mpq.runtime.bench.time_calls", lambda calls, found=found, **_: found)
        assert (words in run("bench", packed, "--runtime", "torch").stderr) == told


def test_a_packed_folder_has_no_table(run, packed, tmp_path):
    result = run("bench", packed, "--runtime", "onednn", "-o", tmp_path / "t.json")
    assert result.exit_code == 2
    assert "--output and --candidates are only for float models" in result.stderr
    assert not (tmp_path / "t.json").exists()


def test_search_and_pareto_within_a_table(run, table, indicators):
    tree = json.loads(table.read_text())
    within = ["--indicators", indicators, "--latency-table", table]
    result = run("search", *MODEL, "--latency", f"{10 * tree['whole']}s", *within, "--json")
    assert result.exit_code == 0, result.stderr
    assert 0 < json.loads(result.stdout)["usage"]["latency"] <= 10 * tree["whole"]
    text = run("search", *MODEL, "--latency", f"{10 * tree['whole']}s", *within).stdout
    assert "latency " in text
    front = run("pareto", *SKELETON, "--limit", "latency", "--points", 3, *within)
    assert front.exit_code == 0, front.stderr
    assert front.stdout.split("\n")[0].split()[-3] == "latency"
    assert "latency" not in run("pareto", *SKELETON, "--points", 3, "--indicators", indicators).stdout


def test_latency_without_a_table_is_refused(run, indicators):
    result = run("search", *MODEL, "--latency", "5ms", "--indicators", indicators)
    assert result.exit_code == 2
    assert "hub-mpq bench MODEL --runtime R -o table.json" in result.stderr
    assert "--latency-table table.json" in result.stderr


def test_a_table_of_another_input_size_is_refused(run, table, indicators):
    other = ["test_resnet", "--input-size", "64", "--model-arg", "num_classes=3", "--no-pretrained"]
    result = run("search", *other, "--latency", "5ms", "--latency-table", table, "--indicators", indicators)
    assert result.exit_code == 2
    assert "3×32×32, but the model reads 3×64×64" in result.stderr
    assert "hub-mpq bench test_resnet --runtime onednn --input-size 3x64x64 -o table.json" in result.stderr


def test_quantize_within_a_table(run, table, folder, indicators, tmp_path):
    limit = f"{20 * json.loads(table.read_text())['whole']}s"
    within = ["--latency", limit, "--latency-table", table, "--indicators", indicators]
    args = ["--data", folder, *within, "--steps", 1, "--no-validate", "--output", tmp_path / "m", *LOADING]
    result = run("quantize", *MODEL, *args)
    assert result.exit_code == 0, result.stderr
    assert "measured on onednn (batch 1, 1 thread" in result.stdout
    told = json.loads(run("inspect", tmp_path / "m", "--json").stdout)["provenance"]["latency"]
    assert told["measured"] - told["spread"] <= told["limit"] == pytest.approx(float(limit[:-1]))
    result = run("quantize", *MODEL, *args[:3], "1ns", *args[4:], "--overwrite")
    assert result.exit_code == 2
    assert "latency <= 1e-09 s (minimum " in result.stderr
