"""Costs against hand-made sums."""

import pytest

from hub_mpq.core import FloatOp, LayerBits, LayerGraph, LayerSpec, Policy, limits
from hub_mpq.cost import (
    activation_memory,
    activation_nbytes,
    activation_peak,
    bitops_breakdown,
    float_bitops,
    graph_bitops,
    layer_bitops,
    level_bitops,
    mean_weight_bits,
    weight_bits,
)
from hub_mpq.errors import InvalidArgument, PolicyMismatch

STEM = LayerSpec("stem", "conv2d", (4, 3, 3, 3), 1000, 108, 75, fixed=LayerBits(8, 8))
BODY = LayerSpec("body", "conv2d", (4, 4, 3, 3), 2000, 144, 33)
WORDS = LayerSpec("words", "embedding", (10, 4), 0, 40, 5, tie="words")
HEAD = LayerSpec("head", "linear", (10, 4), 40, 40, 4, tie="words", weight_owner="words")
FLOATS = (
    FloatOp("attn", "attention", 7, 0, "product of two activations"),
    FloatOp("up", "ConvTranspose2d", 5, 9, "no form"),
)
GRAPH = LayerGraph("m", None, "module", (3, 5, 5), (STEM, BODY, WORDS, HEAD), FLOATS)


def test_bitops_count_everything():
    policy = Policy.uniform(GRAPH, "W3A5")
    parts = {"searched": 2000 * 15 + 40 * 15, "fixed": 1000 * 64, "float": 5 * 1024, "attention": 7 * 1024}
    assert bitops_breakdown(GRAPH, policy) == parts
    assert graph_bitops(GRAPH, policy) == level_bitops(GRAPH, "W3A5") == sum(parts.values())
    assert layer_bitops(BODY, LayerBits(2, 6)) == 24000
    assert layer_bitops(WORDS, LayerBits(2, 32)) == 0
    assert float_bitops(FLOATS[0]) == 7 * 32 * 32


def test_huge_counts_stay_exact():
    layer = LayerSpec("x", "linear", (1, 1), 10**17 + 1, 1, 1)
    assert layer_bitops(layer, LayerBits(8, 8)) == 64 * 10**17 + 64


def test_weights_count_once():
    assert weight_bits(WORDS, LayerBits(3, 32)) == 120
    assert weight_bits(HEAD, LayerBits(3, 5)) == 0
    policy = Policy({**Policy.uniform(GRAPH, "W3A5").bits, "body": LayerBits(6, 5)}, GRAPH.digest)
    assert mean_weight_bits(GRAPH, policy) == pytest.approx((144 * 6 + 40 * 3) / 184)
    pinned = GRAPH.with_fixed({"*": "W8A8"})
    with pytest.raises(InvalidArgument, match="no layer is searched"):
        mean_weight_bits(pinned, Policy.uniform(pinned, "W8A8"))


def test_activation_bytes_round_up():
    assert activation_nbytes(BODY, LayerBits(8, 3)) == 13  # 99 bits
    assert activation_nbytes(BODY, LayerBits(8, 8)) == 33
    assert activation_nbytes(WORDS, LayerBits(8, 32)) == 0
    policy = Policy.uniform(GRAPH, "W3A3")
    assert activation_memory(GRAPH, policy) == 75 + 13 + 0 + 2
    assert activation_peak(GRAPH, policy) == 75


def test_a_tensor_that_several_layers_read_counts_once_for_each_width():
    q, k, v = (LayerSpec(n, "linear", (4, 4), 16, 16, 30, activation_tie="q") for n in "qkv")
    gate = LayerSpec("gate", "conv2d", (4, 30, 1, 1), 120, 120, 30, input_owner="q")
    out = LayerSpec("out", "linear", (4, 4), 16, 16, 9)
    graph = LayerGraph("m", None, "module", (30,), (q, k, v, gate, out))
    assert activation_memory(graph, Policy.uniform(graph, "W8A4")) == 15 + 5
    assert activation_peak(graph, Policy.uniform(graph, "W8A4")) == 15
    bits = {**Policy.uniform(graph, "W8A4").bits, "gate": LayerBits(2, 8)}
    assert activation_memory(graph, Policy(bits, graph.digest)) == 15 + 30 + 5
    for pin in ("W8A4", "W2A8"):  # what fixed and searched layers share is no cost of the searched ones
        pinned = graph.with_fixed({"k": pin})
        found = limits.get("activation_memory").of_policy(pinned, Policy.uniform(pinned, "W8A4"), 0)
        assert found == activation_memory(pinned, Policy.uniform(pinned, "W8A4")) == (20 if pin == "W8A4" else 50)


def test_a_policy_for_another_model_is_refused():
    policy = Policy({"stem": LayerBits(8, 8)}, "0")
    for cost in (graph_bitops, activation_memory, activation_peak, mean_weight_bits):
        with pytest.raises(PolicyMismatch, match="missing layers"):
            cost(GRAPH, policy)
