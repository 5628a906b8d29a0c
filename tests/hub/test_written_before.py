"""Folders written by the release before the house was redrawn (commit 2b73e31) still load, to the bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hub_mpq import HubMPQ
from hub_mpq.core.files import INDICATORS, PACKED
from hub_mpq.nn.quantize import quantized_layers
from hub_mpq.pack import read_indicators

FOLDER = Path(__file__).parent / "written_before"


@pytest.mark.parametrize("name", ["resnet", "gpt2"])
def test_a_packed_folder(name):
    expected = load_file(FOLDER / f"{name}.expected.safetensors")
    mpq = HubMPQ.from_pretrained(FOLDER / name)
    layers = dict(quantized_layers(mpq.model))
    assert {f"weight.{n}" for n in layers} == {key for key in expected if key.startswith("weight.")}
    for layer, module in layers.items():
        assert torch.equal(module.weight_quantizer(module.weight), expected[f"weight.{layer}"]), layer
        if module.input_quantizer is not None:
            assert torch.equal(module.input_quantizer.scale, expected[f"input_scale.{layer}"]), layer
    with torch.no_grad():
        inputs = {"input_ids": expected["input"]} if name == "gpt2" else expected["input"]
        output = mpq(**inputs).logits if name == "gpt2" else mpq(inputs)
    # sums of another processor may differ in their last bits
    torch.testing.assert_close(output, expected["output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "gpt2"])
def test_it_is_written_again_as_it_was(name, tmp_path):
    """All tensors and the policy; the header tells of the version that wrote it."""
    mpq = HubMPQ.from_pretrained(FOLDER / name)
    mpq.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / PACKED) for folder in (FOLDER / name, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "again" / INDICATORS).read_bytes() == (FOLDER / name / INDICATORS).read_bytes()


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("resnet", "dadf43ceefafd42c"),
        ("gpt2", "42124ff928b1b09e"),
    ],
)
def test_indicators(name, digest):
    """Every value, bit by bit; and they serve a search."""
    found = read_indicators(FOLDER / name / INDICATORS)
    rows = [
        f"{side}/{layer}/{bits}={value.hex()}"
        for side in ("weight", "activation")
        for layer, row in sorted(getattr(found, side).items())
        for bits, value in sorted(row.items())
    ]
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16] == digest
    assert (found.strategy, found.sense, found.pairs) == ("limpq", "min", {})
    mpq = HubMPQ.from_pretrained(FOLDER / name)
    assert mpq.scores == found
    assert mpq.search(size="W3").status == "optimal"
