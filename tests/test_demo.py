"""The demo's route at a hundredth of its training; `hub-mpq demo` itself is run by .ci/run."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from hub_mpq import HubMPQ, HubMPQError, demo
from hub_mpq.pack import read_manifest


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    for name in ("FLOAT_EPOCHS", "INDICATOR_EPOCHS", "TUNE_EPOCHS"):
        patch.setattr(demo, name, 0.1)
    said = []
    out = demo.run(tmp_path_factory.mktemp("demo") / "out", say=said.append)
    patch.undo()
    return {**out, "said": said}


def test_the_split_is_fixed_and_clean():
    (x, y), (tx, ty) = demo.digits(0)
    assert (x.shape, tx.shape) == ((1200, 1, 16, 16), (597, 1, 16, 16))
    assert (len(y), len(ty)) == (1200, 597)
    again = demo.digits(0)
    assert x.equal(again[0][0])
    assert not x.equal(demo.digits(1)[0][0])


def test_rows_and_stages(figures):
    rows = {row["row"]: row for row in figures["rows"]}
    assert list(rows) == ["float", "uniform W4A4", "mixed, same BitOps", "mixed, half of the BitOps"]
    full = rows["uniform W4A4"]["bitops"]
    assert 0.9 * full < rows["mixed, same BitOps"]["bitops"] <= full
    assert 0.45 * full < rows["mixed, half of the BitOps"]["bitops"] <= full / 2
    stages = ["train float", "indicators", "search (two budgets)", "fine-tune uniform W4A4", "fine-tune mixed, half"]
    assert list(figures["seconds"])[:5] == stages
    assert len(figures["said"]) == len(figures["seconds"]) - 1  # the total is not announced
    assert all(0 < row["top1"] <= 100 for row in rows.values())


def test_the_folder_is_as_the_hub_wants_it(figures):
    from pathlib import Path

    output = Path(figures["output"])
    assert {p.name for p in output.iterdir()} == {"model", "policy.png", "demo.json"}
    assert {"config.json", "model.mpq.safetensors", "indicators.safetensors"} <= {
        p.name for p in (output / "model").iterdir()
    }
    file = output / "model" / "model.mpq.safetensors"
    assert file.stat().st_size == figures["packed_bytes"]
    saved = next(row for row in figures["rows"] if row["row"] == "mixed, same BitOps")
    assert saved["bytes"] == figures["packed_bytes"]
    assert json.loads((output / "demo.json").read_text())["rows"] == figures["rows"]
    with safe_open(file, "pt") as packed:
        assert any(key.endswith(".weight_packed") for key in packed.keys())  # noqa: SIM118
    assert read_manifest(file).base_model == "resnet10t"
    assert HubMPQ.from_pretrained(output / "model").policy is not None


def test_summary_shows_every_row(figures):
    text = demo.summary(figures)
    for row in figures["rows"]:
        assert row["row"] in text
        assert f"{row['bytes']:,}" in text
    assert "bit-identical logits" in text


def test_it_refuses_a_folder_of_others_before_it_trains(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(demo, "Demo", None)
    with pytest.raises(HubMPQError, match="was not written by the demo"):
        demo.run(tmp_path)


def test_different_answers_are_an_error(figures, monkeypatch, tmp_path):
    for name in ("FLOAT_EPOCHS", "INDICATOR_EPOCHS", "TUNE_EPOCHS"):
        monkeypatch.setattr(demo, name, 0.06)
    monkeypatch.setattr(demo, "_same_answers", lambda *_: False)
    with pytest.raises(HubMPQError, match="gives different logits"):
        demo.run(tmp_path / "out", say=lambda _: None)
