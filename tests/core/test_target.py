"""What a policy is made for: menus, levels, ties, notes, and a limit on the bytes of the target's own file."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from hub_mpq import Budget, Candidates, HubMPQ, LayerBits, Policy, Target, register_target
from hub_mpq.core import LayerSpec, targets
from hub_mpq.errors import InfeasibleBudget, InvalidArgument
from hub_mpq.export.gguf_types import TYPES

TEXT = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


def layer(columns, kind="linear"):
    shape = (64, columns) if kind in ("linear", "embedding") else (64, columns, 3, 3)
    return LayerSpec("x", kind, shape, 1, 64 * columns, columns)


def llama(folder, **changes):
    config = transformers.LlamaConfig(**{"hidden_size": 64, "intermediate_size": 256, **TEXT, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (4, 16), generator=generator)} for _ in range(count)]


def test_gguf_has_the_types_whose_blocks_fill_the_rows():
    names = {str(b.of_weight).partition("A")[0] for b in targets.get("gguf").menu(layer(96))}
    assert names == {"W4g32", "W4g32z", "W5g32", "W5g32z", "W8g32"}
    names = {str(b.of_weight).partition("A")[0] for b in targets.get("gguf").menu(layer(512))}
    assert names == {"W2g16z", "W3g16", "W4g32", "W4g32z", "W5g32", "W5g32z", "W6g16", "W8g32"}
    assert targets.get("gguf").menu(layer(40)) == () == targets.get("gguf").menu(layer(96, "conv2d"))


def test_sizes_of_the_types_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    for one in TYPES:
        assert (one.block, one.block_nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[one.name]]


def test_where_a_k_quant_fits_it_stands_for_its_grid():
    gguf, asymmetric = targets.get("gguf"), LayerBits(4, 32, 32, False)
    assert gguf.nbytes(layer(512), asymmetric) == 64 * 2 * 144  # Q4_K
    assert gguf.nbytes(layer(96), asymmetric) == 64 * 3 * 20  # Q4_1
    assert gguf.nbytes(LayerSpec("x", "linear", (1, 32), 1, 32, 32), LayerBits(4, 32, 32)) == 32  # 18, padded


def test_vllm_has_groups_that_fill_the_rows():
    found = targets.get("vllm").menu(layer(96))
    assert {b.group_size for b in found} == {None, 32}
    assert {(b.weight, b.symmetric) for b in found} == set(itertools.product(range(2, 9), (True, False)))


@pytest.mark.parametrize(
    ("columns", "level", "want"),
    [
        (96, "W4", "W4g32"),
        (96, "W4g32z", "W4g32z"),
        (96, "W3", "W4g32"),
        (96, "W6", "W8g32"),
        (512, "W2", "W2g16z"),
        (512, "W3", "W3g16"),
        (512, "W7", "W8g32"),
    ],
)
def test_a_level_is_the_nearest_choice_that_is_not_narrower(columns, level, want):
    assert targets.get("gguf").level(layer(columns), LayerBits.parse(level)) == LayerBits.parse(want)


@pytest.mark.parametrize(
    ("asked", "all_widths", "want"),
    [
        (Candidates((2, 4, 8), (32,)), False, "W4g32 W4g32z W8g32"),
        (Candidates(), True, "W4g32 W4g32z W5g32 W5g32z W8g32"),
        (Candidates((4, 5), (32,), (32,)), False, "W4g32 W5g32"),
        (Candidates((4, 8), (32,), (32,), False), False, "W4g32z W8g32"),
    ],
)
def test_candidates_are_what_was_asked_for_as_far_as_the_menu_has_it(asked, all_widths, want):
    found = targets.get("gguf").candidates(layer(96), asked, all_widths=all_widths)
    assert found.weights == tuple(sorted(map(LayerBits.parse, want.split())))
    assert found.float_inputs
    assert targets.get("gguf").candidates(layer(96), found) == found
    assert found.grouped(LayerBits(4, 32)) == tuple(b for b in found.weights if b.weight == 4)


def test_what_a_target_cannot_take_is_refused_in_words():
    with pytest.raises(InvalidArgument, match=r"none of the candidates of layer 'x'; choose from 4, 5, 8 bits"):
        targets.get("gguf").candidates(layer(96), Candidates((2, 3), (32,)))
    with pytest.raises(InvalidArgument, match=r"no quantized form.*exclude=\['x'\]"):
        targets.get("gguf").candidates(layer(40), Candidates())
    with pytest.raises(InvalidArgument, match="unknown target 'onnx'; choose from vllm, gguf"):
        targets.get("onnx")


def test_a_policy_is_checked(tmp_path):
    mpq = HubMPQ.from_pretrained(llama(tmp_path), target="vllm")
    assert all(layer.tie for layer in mpq.graph if layer.activation_tie)
    assert mpq.weight_only
    with pytest.raises(InvalidArgument, match=r"does not support layer 'model.layers.0.self_attn.q_proj' at W4g16A32"):
        mpq.apply_policy(Policy.uniform(mpq.graph, "W4g16A32"))
    bits = dict(Policy.uniform(mpq.graph, "W4g32A32").bits)
    bits["model.layers.0.mlp.up_proj"] = LayerBits.parse("W5g32")
    with pytest.raises(
        InvalidArgument,
        match=r"gate_proj' and '.*up_proj' as one matrix, so their bit-widths must be equal, got W4g32A32 and W5",
    ):
        mpq.apply_policy(Policy(bits, mpq.graph.digest))
    assert "written dequantized" in mpq.target.notes(mpq.graph)[0]


def test_size_counts_the_bytes_of_the_targets_file(tmp_path):
    pytest.importorskip("gguf")
    mpq = HubMPQ.from_pretrained(llama(tmp_path, intermediate_size=192), target="gguf")
    data, choices = batches(), [4, 5, 8]
    mpq.quantize(size="W4", train=data, epochs=0, candidates=choices, validate=False)
    least = mpq.usage()["GGUF file"]
    cap = int(least) + 5000
    mpq.quantize(size=cap, train=data, epochs=0, candidates=choices, validate=False)
    used = mpq.result.usage["GGUF file"]
    assert least < used <= cap
    assert used == mpq.usage()["GGUF file"] == mpq.export(tmp_path / "out", "gguf")
    # no policy of the menu scores less within the limit
    table, _ = mpq.score_table()
    names = [x.name for x in mpq.graph.searched]
    nbytes = {n: {b: mpq.target.nbytes(mpq.graph[n], b) for b in table[n]} for n in names}
    beside = used - sum(nbytes[n][mpq.policy.bits[n]] for n in names)
    front = {(beside, 0.0)}
    for name in names:
        pairs = sorted({(size + nbytes[name][b], score + table[name][b]) for size, score in front for b in table[name]})
        front = {(s, x) for i, (s, x) in enumerate(pairs) if s <= cap and all(x < y for _, y in pairs[:i])}
    best = min(score for _, score in front)
    assert sum(table[n][mpq.policy.bits[n]] for n in names) == pytest.approx(best)
    with pytest.raises(InfeasibleBudget, match="GGUF file"):
        mpq.search(size=1000)


def test_a_target_of_ones_own(tmp_path):
    class Eight(Target):
        name = "eight"

        def menu(self, layer):
            return (LayerBits(8, 32), LayerBits(4, 32, 32)) if layer.kind == "linear" else (LayerBits(8, 32),)

    with pytest.raises(InvalidArgument, match="the name of a target must be"):
        register_target(type("Nameless", (Eight,), {"name": "no name"})())
    mpq = HubMPQ.from_pretrained(llama(tmp_path), target=register_target(Eight()))
    targets.unregister("eight")
    mpq.quantize(Budget(size="W8"), train=batches(), epochs=0, candidates=[4, 8], validate=False)
    assert {str(b) for b in mpq.policy.bits.values()} <= {"W8A32", "W4g32A32"}
    assert mpq.usage()["size"] == mpq.save_pretrained(tmp_path / "out")
