"""What once ended in a stack trace is one sentence."""

from __future__ import annotations

import json

import pytest
from cli_toys import SKELETON

TABLE = '{"sense": "min", "layers": {"a": {"x": {"score": 1}}}, "limits": {%s}}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"sense":' + '{"a":' * 5000 + "1" + "}" * 5001, "nested too deeply"),
        ('{"sense": "min", "sense": "max", "layers": {}}', "duplicate name 'sense'"),
        ('{"sense": "min", "layers": {"a": {"x": {"score": 1}}, "a": {"y": {"score": 2}}}}', "duplicate name 'a'"),
        ("9" * 5000, "table.json as JSON: "),
    ],
)
def test_a_table_that_cannot_be_read(run, tmp_path, text, words):
    (tmp_path / "table.json").write_text(text)
    result = run("solve", tmp_path / "table.json")
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("limit", ['"b": Infinity', '"b": 1' + "0" * 400])
def test_limits_without_end(run, tmp_path, limit):
    (tmp_path / "table.json").write_text(TABLE % limit)
    assert "b: 0 of inf" in run("solve", tmp_path / "table.json").stdout
    assert json.loads(run("solve", tmp_path / "table.json", "--json").stdout)["status"] == "optimal"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model-arg", "exclude=x"], "'exclude' is not an argument of the model"),
        (["--model-arg", "input_size=3"], "'input_size' is not an argument of the model"),
        (["--model-arg", "meta=true"], "'meta' is not an argument of the model"),
        (["--library", ""], "library must not be empty"),
        (["--target", " "], "target must not be empty"),
    ],
)
def test_options_that_mean_nothing(run, more, words):
    result = run("inspect", *SKELETON, *more)
    assert result.exit_code == 2
    assert result.stderr.startswith("hub-mpq: ")
    assert words in result.stderr


def test_a_name_longer_than_files_may_have_and_one_with_escapes(run):
    for name in ("x" * 5000, "\x1b[31m"):
        result = run("inspect", name)
        assert result.exit_code == 2
        assert len(result.stderr) < 3000
        assert "\x1b" not in result.stderr


def test_a_front_keeps_to_its_time_limit(run, indicators):
    args = ["pareto", *SKELETON, "--indicators", indicators, "--limit", "size", "--points", "4", "--json"]
    free, cut = (json.loads(run(*args, *more).stdout)["points"] for more in ([], ["--time-limit", "1e-9"]))
    assert {p["status"] for p in free} == {"optimal"}
    assert all(p["bound"] <= p["objective"] for p in cut)
    assert len(cut) > 1
