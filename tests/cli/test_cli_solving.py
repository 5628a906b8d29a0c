"""search, solve and pareto."""

from __future__ import annotations

import json

from cli_toys import MODEL, SKELETON

TABLE = {
    "sense": "min",
    "layers": {
        "a": {"W2A2": {"score": 5.0, "cost": {"bytes": 2}}, "W4A4": {"score": 1.0, "cost": {"bytes": 4}}},
        "b": {"W2A2": {"score": 3.0, "cost": {"bytes": 2}}, "W4A4": {"score": 2.0, "cost": {"bytes": 4}}},
    },
    "limits": {"bytes": 6},
    "ties": [],
}


def test_solve(run, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    result = run("solve", tmp_path / "table.json", "--json")
    tree = json.loads(result.stdout)
    assert tree["choices"] == {"a": "W4A4", "b": "W2A2"}
    assert (tree["status"], tree["objective"], tree["gap"], tree["usage"]) == ("optimal", 4.0, 0.0, {"bytes": 6})
    assert "bytes: 6 of 6" in run("solve", tmp_path / "table.json").stdout


def test_search_obeys_the_budget(run, indicators):
    args = ["search", *SKELETON, "--indicators", indicators, "--size", "300KB", "--weight-bits", "4.5", "--json"]
    tree = json.loads(run(*args).stdout)
    assert tree["usage"]["size"] <= 300_000
    assert tree["usage"]["weight_bits"] <= 4.5
    assert tree["status"] == "optimal"


def test_search_takes_pins_candidates_and_a_plot(run, indicators, tmp_path):
    picture = tmp_path / "deep" / "policy.png"
    args = ["search", *SKELETON, "--indicators", indicators, "--bitops", "W4A4", "--candidates", "2,4,6"]
    result = run(*args, "--pin", "layer1.*=W3A5", "--plot", picture, "--json")
    assert f"saved {picture}" in result.stderr
    bits = json.loads(result.stdout)["policy"]["bits"]
    assert {bits["layer1.0.conv1"], bits["layer1.0.conv2"]} == {"W3A5"}
    searched = {v for k, v in bits.items() if not k.startswith("layer1.") and k not in ("conv1.0", "fc")}
    assert searched <= {f"W{w}A{a}" for w in (2, 4, 6) for a in (2, 4, 6)}
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_search_in_a_packed_folder_uses_its_indicators(run, packed):
    tree = json.loads(run("search", packed, "--bitops", "W3A3", "--json").stdout)
    assert tree["status"] == "optimal"


def test_pareto_is_monotone(run, indicators, tmp_path):
    args = ["pareto", *SKELETON, "--indicators", indicators, "--limit", "size", "--points", "6"]
    points = json.loads(run(*args, "--plot", tmp_path / "front.svg", "--json").stdout)["points"]
    sizes, objectives = ([p["usage"]["size"] for p in points], [p["objective"] for p in points])
    assert len(points) > 3
    assert sizes == sorted(sizes)
    assert objectives == sorted(objectives, reverse=True)
    assert b"<svg" in (tmp_path / "front.svg").read_bytes()
    assert len(run(*args).stdout.splitlines()) == len(points) + 2


def test_pareto_names_limits_as_the_options_do(run, indicators):
    args = ["pareto", *SKELETON, "--indicators", indicators, "--points", "2", "--limit"]
    found = [run(*args, limit, "--json").stdout for limit in ("weight-bits", "weight_bits")]
    assert json.loads(found[0])["limit"] == "weight_bits"
    assert [p["policy"] for p in json.loads(found[0])["points"]] == [
        p["policy"] for p in json.loads(found[1])["points"]
    ]
    refused = run(*args, "activation-peak").stderr
    assert "limit must be one of bitops, size, weight_bits, activation_memory, latency" in refused
    assert "limits a single layer" in refused


def test_search_measures_policies_where_it_is_asked_to(run, indicators, folder):
    args = ["search", *MODEL, "--indicators", indicators, "--bitops", "W4A4", "--validate", folder]
    args += ["--batch-size", "4", "--workers", "0"]
    tree = json.loads(run(*args, "--json").stdout)
    assert [row["name"] for row in tree["measurements"]][:2] == ["optimum", "uniform W4A4"]
    assert tree["validation"]["done"]
    assert tree["validation"]["choosing"] + tree["validation"]["reporting"] <= 24
    named = next(row for row in tree["measurements"] if row["policy"] == tree["policy"])
    assert named["name"].startswith(tree["chosen_by"])
    text = run(*args).stdout
    assert "vs. optimum" in text
    assert "forward passes" in text
    late = json.loads(run(*args, "--validate-seconds", "1e-9", "--json").stdout)
    assert not late["validation"]["done"]
    assert late["policy"] == late["optimum"]
