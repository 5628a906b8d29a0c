"""Text on the command line: a decoder is calibrated on it, and measured by perplexity."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from test_cli_bad_input import refused
from test_cli_learn import only_json
from text_toys import save_decoder, words

from hub_mpq import HubMPQ
from hub_mpq.core.files import PACKED
from hub_mpq.pack import read_manifest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(words(2500))
    return file


def test_a_decoder_is_calibrated_on_text_and_measured_by_token(run, model, text, tmp_path):
    out = tmp_path / "out"
    args = ["quantize", model, "--size", "W4", "--text", text, "--val", text, "--chunk-length", "32", "--output", out]
    tree = only_json(run(*args, "--candidates", "2,3,4,6", "--validate-seconds", "5", "--json"))
    assert "finetune" not in tree["seconds"]
    assert {"rounding", "search"} <= set(tree["seconds"])
    bits = read_manifest(out / "model.mpq.safetensors").policy.bits
    assert {level.activation for level in bits.values()} == {32}
    assert tree["metrics"]["quantized"]["task"] == "causal-lm"
    assert (out / "tokenizer.json").is_file()
    for options, tokens in (([], 2500 - 40), (["--context", "32", "--stride", "8"], 2499)):
        found = only_json(run("evaluate", out, "--data", text, *options, "--json"))
        assert found["quantized"] is True
        assert found["tokens"] == tokens
        known = HubMPQ.from_pretrained(out).perplexity(text, context=found["context"], stride=found["stride"])
        assert found["perplexity"] == pytest.approx(known["perplexity"], rel=1e-6)
    said = run("evaluate", out, "--data", text, "--context", "32").stdout
    assert "perplexity" in said
    assert "tokens 2421" in said
    assert "context 32" in said
    assert "stride 32" in said


@pytest.mark.parametrize(
    ("more", "steps", "inputs_are_float"),
    [
        (["--size", "W4", "--steps", "2"], 2, True),
        (["--size", "W4", "--epochs", "1"], 78, True),
        (["--bitops", "W4A8"], 0, False),
        (["--size", "W4A8"], 0, False),
    ],
)
def test_text_alone_calibrates_and_says_otherwise_when_told(run, model, text, tmp_path, more, steps, inputs_are_float):
    out = tmp_path / "out"
    given = ["--text", text, "--chunk-length", "32", "--indicator-steps", "1", "--no-validate", "--candidates", "4,8"]
    tree = only_json(run("quantize", model, *given, *more, "--output", out, "--json"))
    manifest = read_manifest(out / "model.mpq.safetensors")
    assert manifest.provenance.get("finetune", {"steps": 0})["steps"] == steps
    assert ("finetune" in tree["seconds"]) == (steps > 0)
    found = {bits.activation for name, bits in manifest.policy.bits.items() if name != "model.embed_tokens"}
    assert found == {32} if inputs_are_float else found <= {4, 8}


def test_data_of_a_decoder_is_text_too(run, model, text, tmp_path):
    out = tmp_path / "out"
    args = ["finetune", model, "--policy", "W4A8", "--data", text, "--steps", "1", "--batch-size", "2"]
    tree = only_json(run(*args, "--output", out, "--json"))
    assert tree["usage"]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "mpq"


def test_mistakes_with_text(run, model, text, folder, tmp_path):
    from cli_toys import MODEL

    out = ["--output", tmp_path / "out"]
    both = ["quantize", model, "--size", "W4", "--text", text, "--data", text, *out]
    refused(run(*both), "--data and --text")
    refused(run("quantize", *MODEL, "--size", "W4", "--text", text, *out), "test_resnet does not read text")
    refused(run("evaluate", *MODEL, "--data", folder, "--context", "64"), "--context and --stride")
    refused(run("evaluate", model, "--data", text, "--context", "128"), "2 to 64 tokens")
    refused(run("evaluate", model, "--data", tmp_path / "none.txt"), "none.txt as text")
    refused(run("quantize", model, "--size", "W4", "--text", text, "--chunk-length", "65", *out), "at most 64 for this")
    text.write_text(words(30))
    refused(run("quantize", model, "--size", "W4", "--text", text, *out), "30 tokens, fewer than one chunk of 64")
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
import hub_mpq.nn.rounded_weights as module
left = iter(range(6))
plain = module.write_atomic
def write(*args):
    plain(*args)
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
module.write_atomic = write
from hub_mpq.cli import main
main()
"""


def test_a_run_that_is_killed_while_it_rounds_goes_on(run, model, text, tmp_path, monkeypatch):
    """SIGKILL after seven layers: the others are rounded by the next run, and the file is that of a run in one go."""
    from hub_mpq.train import round_weights

    args = ["quantize", model, "--size", "W3", "--text", text, "--chunk-length", "32", "--group-size", "16,none"]
    args = [*map(str, args), "--asymmetric", "--candidates", "2,3,4", "--no-validate"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*args, "--output", whole).exit_code == 0
    process = subprocess.run([sys.executable, "-c", KILLED, *args, "--output", str(cut)], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not cut.exists()
    assert len(list((tmp_path / "cut.checkpoints" / "rounded").glob("*.safetensors"))) == 7
    done, plain = [], round_weights.round_weight
    monkeypatch.setattr(round_weights, "round_weight", lambda w, x, *rest: (done.append(x.name), plain(w, x, *rest))[1])
    refused(run(*args, "--output", cut), "interrupted run")
    refused(run(*args, "--rounding", "nearest", "--output", cut, "--resume"), "different options (rounding)")
    assert run(*args, "--output", cut, "--resume").exit_code == 0
    assert len(done) == len(read_manifest(whole / PACKED).policy.bits) - 7
    assert (cut / PACKED).read_bytes() == (whole / PACKED).read_bytes()
    assert not (tmp_path / "cut.checkpoints").exists()
    found = {(b.group_size, b.symmetric) for b in read_manifest(cut / PACKED).policy.bits.values()}
    assert found <= {(16, False), (None, False), (None, True)}
    assert len(found) > 1


def test_mistakes_with_groups(run, model, text, tmp_path):
    args = ["quantize", model, "--size", "W4", "--text", text, "--output", tmp_path / "out"]
    refused(run(*args, "--group-size", "many"), "--group-size: 'many' is not a valid group size")
    refused(run(*args, "--group-size", "3"), "--group-size: a group size must be")
    refused(run(*args, "--rounding", "awq"), "'gptq' or 'nearest'")
    assert not (tmp_path / "out").exists()
