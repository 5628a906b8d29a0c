"""Budgets to tables and back: levels, absolute amounts, ties, the golden case through a LayerGraph."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from hub_mpq.core import Budget, Candidates, FloatOp, Indicators, LayerBits, LayerGraph, LayerSpec, Policy
from hub_mpq.cost import graph_bitops
from hub_mpq.errors import InfeasibleBudget, InvalidArgument
from hub_mpq.search.candidates import resolve_candidates
from hub_mpq.search.policy_search import pareto_front, search_policy, usage_of
from hub_mpq.search.scores import available, balance, limpq_scores

GOLDEN = Path(__file__).parents[1] / "solve" / "golden_limpq_resnet50.json"
F8 = LayerBits(8, 8)


def toy(ties=(None, None, None), inputs=(None, None, None)):
    layers = [LayerSpec("stem", "conv2d", (4, 3, 3, 3), 1000, 108, 64, fixed=F8)]
    for i, (macs, count) in enumerate([(5000, 400), (9000, 900), (2000, 250)]):
        spec = LayerSpec(
            f"body.{i}", "linear", (count // 5, 5), macs, count, 50 + i, tie=ties[i], activation_tie=inputs[i]
        )
        layers.append(spec)
    return LayerGraph(
        "toy", None, "module", (3, 8, 8), tuple(layers), (FloatOp("attn", "attention", 70, 0, "product"),)
    )


def scores_of(graph, widths=(2, 3, 4)):
    weight = {x.name: {b: (i + 1) / 2**b + 0.001 * b for b in widths} for i, x in enumerate(graph.searched)}
    activation = {x.name: {b: (3 - i) / 3**b + 0.001 * b for b in widths} for i, x in enumerate(graph.searched)}
    indicators = Indicators(weight, activation)
    return limpq_scores(indicators, graph, resolve_candidates(graph, widths), 1.5)


def brute(graph, scores, allowed):
    names = [x.name for x in graph.searched]
    best = None
    for combo in itertools.product(*(scores[n] for n in names)):
        policy = Policy({"stem": F8, **dict(zip(names, combo, strict=True))}, graph.digest)
        if allowed(policy):
            value = sum(scores[n][b] for n, b in zip(names, combo, strict=True))
            best = value if best is None else min(best, value)
    return best


def test_a_level_speaks_of_the_searched_layers_and_an_absolute_amount_of_all():
    graph = toy()
    scores = scores_of(graph)
    level = search_policy(graph, scores, Budget(bitops="W3A3"), base_bytes=1000)
    total = graph_bitops(graph, Policy.uniform(graph, "W3A3"))
    absolute = search_policy(graph, scores, Budget(bitops=total), base_bytes=1000)
    assert level.policy == absolute.policy
    assert level.usage["bitops"] <= total
    assert level.status == "optimal"
    assert level.gap == 0
    below = search_policy(graph, scores, Budget(bitops=level.usage["bitops"] - 1), base_bytes=1000)
    assert below.usage["bitops"] < level.usage["bitops"]


@pytest.mark.parametrize(
    "budget",
    [
        {"bitops": "W3A3"},
        {"bitops": "W3A3", "size": 3650},
        {"weight_bits": 2.7, "activation_memory": "A3"},
        {"compression": 9.0},
        {"bitops": 1.4e5 + 64000 + 70 * 1024, "activation_peak": "A3"},
    ],
)
def test_every_limit_and_mix_equals_brute_force(budget):
    graph = toy()
    scores = scores_of(graph)
    result = search_policy(graph, scores, Budget(**budget), base_bytes=1000)
    uniform = usage_of(graph, Policy.uniform(graph, "W3A3"), None, 1000)
    a3_sum = uniform["activation_memory"]
    caps = {
        "bitops": uniform["bitops"] if budget.get("bitops") == "W3A3" else budget.get("bitops"),
        "size": budget.get("size"),
        "weight_bits": budget.get("weight_bits"),
        "activation_memory": a3_sum if "activation_memory" in budget else None,
        "activation_peak": max(-(-(50 + i) * 3 // 8) for i in range(3)) if "activation_peak" in budget else None,
    }

    def allowed(policy):
        use = usage_of(graph, policy, None, 1000)
        if "compression" in budget and use["compression"] < budget["compression"] * (1 - 1e-12):
            return False
        searched_peak = max(-(-x.activation_count * policy.bits[x.name].activation // 8) for x in graph.searched)
        for name, cap in caps.items():
            value = searched_peak if name == "activation_peak" else use[name]
            if cap is not None and value > cap + 1e-9:
                return False
        return True

    assert allowed(result.policy)
    assert result.objective == pytest.approx(brute(graph, scores, allowed), abs=1e-12)


def test_layers_of_one_input_share_the_activation_width_only():
    graph = toy(inputs=("q", "q", "q"))
    scores = scores_of(graph)
    result = search_policy(graph, scores, Budget(bitops="W3A3"), base_bytes=0)
    bits = [result.policy.bits[f"body.{i}"] for i in range(3)]
    assert len({b.activation for b in bits}) == 1
    cap = graph_bitops(graph, Policy.uniform(graph, "W3A3"))

    def allowed(policy):
        shared = len({policy.bits[x.name].activation for x in graph.searched}) == 1
        return shared and graph_bitops(graph, policy) <= cap

    assert result.objective == pytest.approx(brute(graph, scores, allowed), abs=1e-12)


def one_tensor(graph, readers, owner):
    layers = tuple(replace(x, activation_count=50, input_owner=owner) if x.name in readers else x for x in graph)
    return replace(graph, layers=layers)


@pytest.mark.parametrize("inputs", [("body.0", "body.0", None), (None, None, None)])
@pytest.mark.parametrize("pin", [None, "W4A3", "W4A8"])
def test_memory_of_a_tensor_that_several_layers_read(inputs, pin):
    graph = one_tensor(toy(inputs=inputs), ["body.1", "body.2"], "body.0")
    graph = one_tensor(graph, ["body.0"], None)
    graph = graph.with_fixed({"body.2": pin}) if pin else graph
    scores = scores_of(graph)
    pinned = {x.name: x.fixed for x in graph if x.fixed}
    readers = [x.name for x in graph.searched]
    least = 64 + {None: 13, "W4A3": 19, "W4A8": 13 + 50}[pin]
    with pytest.raises(InfeasibleBudget) as caught:
        search_policy(graph, scores, Budget(activation_memory=least - 1), base_bytes=0)
    assert caught.value.least["activation_memory"] == least
    level = usage_of(graph, Policy.uniform(graph, "W3A3"), None, 0)["activation_memory"]
    for limit, cap in (("A3", level), (least, least), (64 + 13 + 50, 64 + 13 + 50)):
        result = search_policy(graph, scores, Budget(activation_memory=limit), base_bytes=0)
        best = None
        for combo in itertools.product(*(scores[n] for n in readers)):
            policy = Policy({**pinned, **dict(zip(readers, combo, strict=True))}, graph.digest)
            if len({b.activation for b in combo}) == 1 and usage_of(graph, policy, None, 0)["activation_memory"] <= cap:
                value = sum(scores[n][b] for n, b in zip(readers, combo, strict=True))
                best = value if best is None else min(best, value)
        assert result.objective == pytest.approx(best, abs=1e-12)
        assert result.usage["activation_memory"] <= cap
    free = search_policy(graph, scores, Budget(bitops="W3A3"), base_bytes=0).policy.bits
    assert inputs[0] or len({free[n].activation for n in readers}) > 1  # no other limit ties them


def test_tied_layers_share_everything_within_one_input_and_across():
    for graph in (toy(ties=("t", None, "t"), inputs=("q", "q", "q")), toy(ties=("t", None, "t"))):
        result = search_policy(graph, scores_of(graph), Budget(bitops="W3A3"), base_bytes=0)
        assert result.policy.bits["body.0"] == result.policy.bits["body.2"]


def test_a_searched_embedding_and_its_tied_head_share_the_weight_width_only():
    word = LayerSpec("word", "embedding", (16, 64), 0, 1024, 8, tie="t")
    body = LayerSpec("body.1", "linear", (24, 64), 9000, 1536, 50)
    head = LayerSpec("head", "linear", (16, 64), 2000, 1024, 50, tie="t", weight_owner="word")
    for inputs in (None, "q"):
        layers = (LayerSpec("stem", "conv2d", (4, 3, 3, 3), 1000, 108, 64, fixed=F8), word, body, head)
        layers = tuple(replace(x, activation_tie=inputs if x.kind == "linear" else None) for x in layers)
        graph = LayerGraph("toy", None, "module", (3, 8, 8), layers, ())
        scores = scores_of(graph)
        scores["body.1"] = {bits: 10 * score for bits, score in scores["body.1"].items()}
        size = usage_of(graph, Policy.uniform(graph, "W3A3"), None, 0)["size"]
        # the head's weights cost no bytes: its widest must not be taken for the best before the embedding is asked
        for budget in (Budget(size=size), Budget(size=size, bitops="W3A3")):
            result = search_policy(graph, scores, budget, base_bytes=0)
            bits = result.policy.bits
            assert bits["word"].weight == bits["head"].weight
            assert (bits["word"].activation, bits["head"].activation < 32) == (32, True)
            cap = graph_bitops(graph, Policy.uniform(graph, "W3A3")) if "bitops" in budget.limits else float("inf")

            def allowed(policy, graph=graph, cap=cap, inputs=inputs, size=size):
                bits = policy.bits
                if bits["word"].weight != bits["head"].weight:
                    return False  # such a policy has no usage
                one_input = inputs is None or bits["head"].activation == bits["body.1"].activation
                fits = usage_of(graph, policy, None, 0)["size"] <= size and graph_bitops(graph, policy) <= cap
                return fits and one_input

            assert result.objective == pytest.approx(brute(graph, scores, allowed), abs=1e-12)


def test_named_costs():
    graph = toy()
    scores = scores_of(graph)
    table = {"body.1": {f"W{w}A{a}": float(w) for w in (2, 3, 4) for a in (2, 3, 4)}}
    result = search_policy(graph, scores, Budget(costs={"latency_ms": (2.0, table)}), base_bytes=0)
    assert result.policy.bits["body.1"].weight == 2
    assert result.usage["latency_ms"] == 2.0
    with pytest.raises(InvalidArgument, match=r"no entry for layer 'body.1' at W"):
        search_policy(graph, scores, Budget(costs={"latency_ms": (2.0, {"body.1": {"W2A2": 1.0}})}), base_bytes=0)


def test_unreachable_budgets_say_the_least_in_whole_model_terms():
    graph = toy()
    scores = scores_of(graph)
    least = graph_bitops(graph, Policy.uniform(graph, "W2A2"))
    with pytest.raises(InfeasibleBudget) as caught:
        search_policy(graph, scores, Budget(bitops=least - 1), base_bytes=0)
    assert caught.value.least["bitops"] == least
    assert caught.value.binding == ["bitops"]
    assert search_policy(graph, scores, Budget(bitops=least), base_bytes=0).usage["bitops"] == least
    with pytest.raises(InfeasibleBudget, match="activation_peak"):
        search_policy(graph, scores, Budget(activation_peak=3), base_bytes=0)


@pytest.mark.parametrize(
    "budget", [{"bitops": "W4"}, {"size": "A4"}, {"compression": "lots"}, {"compression": 0.5}, {"bitops": "34"}]
)
def test_limits_that_mean_nothing_are_refused(budget):
    with pytest.raises(InvalidArgument):
        search_policy(toy(), scores_of(toy()), Budget(**budget), base_bytes=0)


def test_front_is_monotone_and_ends_at_the_ends():
    graph = toy()
    front = pareto_front(graph, scores_of(graph), limit="bitops", points=8, base_bytes=0)
    used, objectives = [r.usage["bitops"] for r in front], [r.objective for r in front]
    assert used[0] == graph_bitops(graph, Policy.uniform(graph, "W2A2"))
    assert used == sorted(used)
    assert objectives == sorted(objectives, reverse=True)
    with pytest.raises(InvalidArgument, match="limit must be one of"):
        pareto_front(graph, scores_of(graph), limit="speed", points=8, base_bytes=0)
    for limit in ("compression", "activation_peak"):  # a minimum, and a limit on one layer
        with pytest.raises(InvalidArgument, match=f"limit must be one of .*, got '{limit}'"):
            pareto_front(graph, scores_of(graph), limit=limit, points=8, base_bytes=0)


def test_outlier_widths_are_dropped_but_never_the_narrowest():
    assert available({2: 0.5, 3: 0.1, 4: 0.2, 5: 0.05}) == [2, 4, 5]
    assert available({2: 0.1, 3: 0.2}) == [2, 3]
    assert available({4: 0.1}) == [4]


def test_candidates_by_kind_and_pattern():
    graph = toy()
    out = resolve_candidates(graph, {"linear": [4, 2], "body.2": Candidates((8,), (4,))})
    assert out["body.0"] == Candidates((2, 4), (2, 4))
    assert out["body.2"].weight == (8,)
    with pytest.raises(InvalidArgument, match="conv3d"):
        resolve_candidates(graph, {"conv3d": [4]})
    with pytest.raises(InvalidArgument, match="no weight indicator"):
        limpq_scores(Indicators({}, {}), graph, resolve_candidates(graph, [4]), 1.0)


def test_published_policy_of_the_authors_through_a_layer_graph():
    """LIMPQ on ResNet-50 at W3A4 and 12.2x: their indicators and un-floored MACs, all 52 layers of their policy."""
    golden = json.loads(GOLDEN.read_text())
    fixed = tuple(
        LayerSpec(name, "conv2d", (count,), 0, count, 1, fixed=F8) for name, count in golden["fixed_weights"].items()
    )
    layers = tuple(
        LayerSpec(name, "conv2d", (row["weight_count"],), row["macs_unfloored"], row["weight_count"], 1)
        for name, row in golden["layers"].items()
    )
    graph = LayerGraph("resnet50", None, "timm", (3, 224, 224), fixed + layers)
    indicators = Indicators(
        *(
            {n: {int(b): s for b, s in r[side].items()} for n, r in golden["layers"].items()}
            for side in ("weight", "activation")
        )
    )
    case = golden["cases"][0]
    scores = limpq_scores(indicators, graph, resolve_candidates(graph, None), case["alpha"])
    result = search_policy(graph, scores, Budget(bitops="W3A4", compression=12.2), base_bytes=0)
    assert result.objective == pytest.approx(case["objective"], abs=1e-9)
    found = [result.policy.bits[name] for name in golden["layers"]]
    assert "".join(str(b.weight) for b in found) == case["weight_bits"]
    assert "".join(str(b.activation) for b in found) == case["activation_bits"]
    assert balance(indicators) > 0


def test_fixed_layers_count_in_named_costs_and_in_the_peak():
    graph = toy()
    scores = scores_of(graph)
    row = {f"W{w}A{a}": float(w) for w in (2, 3, 4, 8) for a in (2, 3, 4, 8)}
    table = {"stem": row, "body.1": row}
    result = search_policy(graph, scores, Budget(costs={"ms": (11.0, table)}), base_bytes=0)
    assert result.usage["ms"] <= 11.0
    assert result.policy.bits["body.1"].weight == 3
    with pytest.raises(InfeasibleBudget, match="ms"):
        search_policy(graph, scores, Budget(costs={"ms": (9.0, table)}), base_bytes=0)
    with pytest.raises(InvalidArgument, match="typo"):
        search_policy(graph, scores, Budget(costs={"ms": (9.0, {"typo": row})}), base_bytes=0)
    with pytest.raises(InvalidArgument, match="stem"):
        search_policy(graph, scores, Budget(costs={"ms": (9.0, {"stem": {"W2A2": 1.0}})}), base_bytes=0)
    with pytest.raises(InfeasibleBudget, match="activation_peak"):
        search_policy(graph, scores, Budget(activation_peak=63), base_bytes=0)
