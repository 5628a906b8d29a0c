"""Runtimes as targets: menus that are exact on every CPU, and policies that keep to them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from hub_mpq import Candidates, HubMPQ, LayerBits, Policy
from hub_mpq.cli import app
from hub_mpq.core import LayerGraph, LayerSpec, runtimes, targets
from hub_mpq.core.bits import nearest
from hub_mpq.errors import InvalidArgument
from hub_mpq.runtime import onednn
from hub_mpq.runtime.integer_layer import inexact_sums, integer_layers
from hub_mpq.runtime.targets import NOTES, RuntimeTarget

LINEAR = LayerSpec("x", "linear", (64, 96), 1, 64 * 96, 96)
DEPTHWISE = LayerSpec("x", "conv2d", (8, 1, 1, 1), 1, 8, 8)
CONVOLUTION = LayerSpec("x", "conv2d", (8, 16, 3, 3), 1, 8 * 144, 16)
EMBEDDING = LayerSpec("x", "embedding", (64, 96), 0, 64 * 96, 1)
ALL = {LayerBits(w, a) for w in range(1, 9) for a in range(1, 9)}
W8A8 = LayerBits(8, 8)


def written(policy):
    return {name: str(bits) for name, bits in policy.bits.items()}


@pytest.fixture
def target():
    return targets.get("onednn")


@pytest.fixture(params=[False, True], ids=["vnni", "without"])
def saturates(request, monkeypatch):
    """This CPU, with and without the instruction that adds in 32 bits."""
    monkeypatch.setattr(onednn, "saturates", lambda: request.param)
    return request.param


def test_the_menu_is_the_same_on_every_cpu(target, saturates):
    assert set(target.menu(LINEAR)) == ALL - {W8A8}
    assert set(target.menu(DEPTHWISE)) == ALL, "one product an output: there is nothing to add up"
    assert (W8A8 in target.runtime.menu(LINEAR)) != saturates


def test_each_runtime_that_computes_in_integers_is_a_target():
    found = [x for x in targets if isinstance(x, RuntimeTarget)]
    assert {x.name for x in found} == {x.name for x in runtimes} - {"torch"}
    assert targets.names()[:2] == ["vllm", "gguf"]
    for one in found:
        assert one.notes(LayerGraph("x", None, "timm", (3, 8, 8), (LINEAR,)))[:2] == NOTES[one.name]
        if one.runtime.available() is None:  # what it offers, the runtime can compute here
            for layer in (LINEAR, DEPTHWISE, CONVOLUTION):
                assert set(one.menu(layer)) <= set(one.runtime.menu(layer))


def test_targets_import_no_engine():
    code = (
        "import sys; from hub_mpq.core import targets; targets.names(); "
        "assert not {'openvino', 'onnxruntime', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("level", "want"),
    [("W8A8", "W7A8"), ("W8A7", "W8A7"), ("W4A4", "W4A4"), ("W4", "W4A8"), ("W8", "W7A8"), ("W4g32A8", "W4A8")],
)
def test_a_level_is_the_pair_that_lacks_the_fewest_bits(target, level, want):
    assert target.level(LINEAR, LayerBits.parse(level)) == LayerBits.parse(want)


def test_nearest_lacks_little_then_spares_little_then_narrows_the_weight():
    pairs = [LayerBits.parse(x) for x in ("W2A8", "W4A4", "W8A2", "W6A6")]
    assert nearest(pairs, LayerBits(4, 5)) == LayerBits(6, 6)
    assert nearest(pairs, LayerBits(3, 3)) == LayerBits(4, 4)
    assert nearest(pairs, LayerBits(8, 8)) == LayerBits(6, 6)
    assert nearest([LayerBits(2, 8), LayerBits(8, 2)], W8A8) == LayerBits(2, 8)


def test_an_embedding_has_a_weight_alone(target):
    assert set(target.menu(EMBEDDING)) == {LayerBits(w, 32) for w in range(1, 9)}
    assert target.level(EMBEDDING, W8A8) == LayerBits(8, 32)


def test_candidates_are_pairs(target):
    found = target.candidates(LINEAR, Candidates((4, 8), (4, 8)))
    assert [str(b) for b in found.pairs] == ["W4A4", "W4A8", "W8A4"]
    assert found.weight == found.activation == (4, 8)
    assert not found.float_inputs
    assert target.candidates(LINEAR, found) == found
    assert found.grouped(W8A8) == ()
    assert found.grouped(LayerBits(8, 32)) == (LayerBits(8, 32),)
    assert set(target.candidates(LINEAR, Candidates(), all_widths=True).pairs) == ALL - {W8A8}
    with pytest.raises(
        InvalidArgument, match=r"none of the candidates of layer '.+'; choose from 1 to 8 bits \(except W8A8\)"
    ):
        target.candidates(LINEAR, Candidates((8,), (8,)))
    with pytest.raises(InvalidArgument, match="none of the candidates"):
        target.candidates(LINEAR, Candidates((4,), (32,)))


def test_default_8_bit_layers_are_fitted_before_training(net, train, tmp_path):
    plain = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8))
    assert {str(x.fixed) for x in plain.graph if x.fixed} == {"W8A8"}
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8), target="onednn")
    assert {x.name: str(x.fixed) for x in mpq.graph if x.fixed} == {"0": "W7A8", "13": "W7A8"}
    mpq.quantize(bitops="W4A4", train=train, epochs=0, validate=False, indicator_options={"steps": 4})
    mpq.target.check(mpq.graph, mpq.policy)
    assert mpq.usage()["bitops"] <= plain.usage("W4A4")["bitops"]
    report = mpq.report()
    assert "made for onednn\n" in report
    assert all(note in report for note in NOTES["onednn"])
    mpq.save_pretrained(tmp_path / "out")
    again = HubMPQ.from_pretrained(tmp_path / "out", module=net)
    assert (again.target, again.policy) == (mpq.target, mpq.policy)
    assert again._manifest(again.policy).provenance["target"] == "onednn"


@pytest.mark.parametrize("strategy", ["limpq", "gradient", "mse", "dq", "bsq", "ebs"])
def test_no_search_leaves_the_menu(net, train, strategy):
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8), target="onednn")
    budget = {} if strategy in ("dq", "bsq") else {"bitops": "W8A8"}
    options = {"steps": 2}
    mpq.quantize(
        train=train, val=train, epochs=0, strategy=strategy, candidates=[7, 8], indicator_options=options, **budget
    )
    assert W8A8 not in mpq.policy.bits.values()
    if budget:
        assert mpq.result.measurements
        assert all(W8A8 not in m.policy.bits.values() for m in mpq.result.measurements)


def test_scores_that_were_learned_without_a_target_serve_it(net, train):
    x = torch.zeros(1, 1, 8, 8)
    plain = HubMPQ.from_module(net, x)
    plain.train_indicators(train, steps=4)
    for how in ("given", "held"):
        mpq = HubMPQ.from_module(net, x, target="onednn")
        mpq.scores = plain.scores if how == "held" else None
        given = {"indicators": plain.scores} if how == "given" else {}
        mpq.quantize(bitops="W4A4", train=train, epochs=0, validate=False, **given)
        assert mpq.scores is plain.scores
        assert {str(x.fixed) for x in mpq.graph if x.fixed} == {"W7A8"}
        assert all(mpq.policy.bits[x.name].weight <= 6 for x in mpq.graph.searched)


def test_what_training_settled_on_takes_the_nearest_pair(net):
    from hub_mpq.core import Indicators
    from hub_mpq.search.policy_search import inferred_policy

    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8), target="onednn")
    names = [x.name for x in mpq.graph.searched]
    inferred = dict(zip(names, ("W8A8", "W3A8", "W8A2"), strict=True))
    found = Indicators({}, {}, pairs={n: {} for n in names}, provenance={"strategy": "dq", "inferred": inferred})
    policy = inferred_policy(mpq.graph, found, mpq._candidates(mpq.graph, None))
    assert [str(policy.bits[n]) for n in names] == ["W7A8", "W3A8", "W8A2"]


def test_a_pin_or_a_policy_that_it_cannot_run_is_refused(net, train):
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(
        InvalidArgument, match="'onednn' does not support layer '0' at W8A8; the nearest choice is W7A8"
    ):
        HubMPQ.from_module(net, x, target="onednn", fixed={"0": "W8A8"})
    with pytest.raises(InvalidArgument, match="at W4A32; the nearest choice is W4A8"):
        HubMPQ.from_module(net, x, target="onednn", fixed={"3": "W4"})
    with pytest.raises(InvalidArgument, match="computes in integers and cannot be combined with weight_only=True"):
        HubMPQ.from_module(net, x, target="onednn", weight_only=True)
    mpq = HubMPQ.from_module(net, x, target="onednn", fixed={"0": "W8A7", "13": None})
    assert str(mpq.graph["0"].fixed) == "W8A7"
    with pytest.raises(InvalidArgument, match="at W8A8; the nearest choice is W7A8"):
        mpq.apply_policy(Policy(dict.fromkeys(mpq.graph.names, W8A8), mpq.graph.digest))
    mpq.apply_policy("W8A8", train)
    assert set(written(mpq.policy).values()) == {"W8A7", "W7A8"}


def test_a_head_and_the_embedding_that_share_a_weight_stay_of_one_width(tmp_path):
    tiny = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**tiny, intermediate_size=64, max_position_embeddings=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    mpq = HubMPQ.from_pretrained(tmp_path / "bert", target="onednn", sequence_length=8)
    fixed = {x.name.rpartition(".")[2]: str(x.fixed) for x in mpq.graph if x.fixed}
    assert (fixed["word_embeddings"], fixed["decoder"]) == ("W7A32", "W7A8")
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 64, (4, 8), generator=generator)} for _ in range(3)]
    mpq.apply_policy("W8A8", data)
    assert set(written(mpq.policy).values()) == {"W7A32", "W8A32", "W7A8"}
    free = {x.name: None for x in mpq.graph if x.fixed}
    mpq.quantize(bitops="W8A8", train=data, epochs=0, strategy="gradient", validate=False, fixed=free)
    mpq.target.check(mpq.graph, mpq.policy)
    head, table = (mpq.policy.bits[n] for n in ("cls.predictions.decoder", "bert.embeddings.word_embeddings"))
    assert head.weight == table.weight
    assert "3 layers with float inputs" in mpq.report()


def test_notes_tell_what_this_cpu_could_do(target, saturates, net, monkeypatch):
    graph = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).graph
    told = " ".join(target.notes(graph))
    assert ("computes W8A8 exactly too" in told) != saturates
    monkeypatch.setattr(type(target.runtime), "available", lambda _: "it is no x86 CPU")
    assert "is not available on this machine: it is no x86 CPU." in " ".join(target.notes(graph))


def test_the_policy_runs_in_integers_in_every_layer_without_vnni(net, data):
    """Fails for a default policy, whose first and last layers are W8A8, and holds for one of the target."""
    kept = {}
    for target in (None, "onednn"):
        mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8), target=target)
        mpq.apply_policy("W8A8", DataLoader(data, 32))
        layers, why = integer_layers(mpq.model)
        assert not why
        kept[target] = [name for name, layer in layers.items() if inexact_sums(layer, saturates=True)]
    assert set(kept[None]) >= {"0"}
    assert kept["onednn"] == []


def test_the_command_line_takes_it():
    out = CliRunner().invoke(app, ["inspect", "resnet10t", "--target", "onednn"])
    assert out.exit_code == 0, out.output
    assert "pinned W7A8" in out.output
    out = CliRunner().invoke(app, ["quantize", "resnet10t", "--help"])
    assert "onednn" in out.output
