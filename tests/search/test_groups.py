"""Groups and zero points as choices of a search, and the whole route for weights alone."""

import json
from dataclasses import replace

import pytest
import torch
from text_toys import decoder
from torch import nn

from hub_mpq import Budget, Candidates, HubMPQ
from hub_mpq.core import Indicators, LayerBits, Policy
from hub_mpq.cost.size import layer_nbytes
from hub_mpq.errors import InvalidArgument
from hub_mpq.search.candidates import resolve_candidates
from hub_mpq.search.measure import PolicyMeter
from hub_mpq.search.policy_search import inferred_policy, longest_header
from hub_mpq.search.scores import candidates_of, equal_scores, score_table
from hub_mpq.search.sensitivity import LEAST, monotone
from hub_mpq.tasks import task_of
from hub_mpq.train import round_weights as rounding_module

IDS = torch.randint(0, 48, (96, 32), generator=torch.Generator().manual_seed(2))
BATCHES = [{"input_ids": IDS[i : i + 4]} for i in range(0, 96, 4)]


def loaded(**more):
    return HubMPQ.from_module(decoder(), BATCHES[0], weight_only=True, **more)


@pytest.mark.parametrize(
    ("budget", "more"),
    [
        ({"weight_bits": 4.0}, {}),
        ({"size": "W3"}, {"group_size": 16}),
        ({"size": "W4"}, {"group_size": [None, 32, 16], "symmetric": False}),
        ({"weight_bits": 3.5}, {"group_size": [16, None], "rounding": "nearest"}),
        ({"size": "W4g16"}, {"candidates": [2, 3, 4, 5], "strategy": "kl", "group_size": [16]}),
        ({"size": "W4"}, {"strategy": "mse", "group_size": [None, 16]}),
    ],
)
def test_bytes_are_counted_to_the_byte(budget, more, tmp_path):
    """What the solver counts is what the file has, scales and zero points included."""
    mpq = loaded()
    mpq.quantize(train=BATCHES, epochs=0, validate=False, **budget, **more)
    saved = mpq.save_pretrained(tmp_path)
    assert saved == mpq.usage()["size"] == mpq.result.usage["size"]
    sizes = more.get("group_size")
    allowed = set(sizes if isinstance(sizes, list) else [sizes])
    found = {mpq.policy.bits[x.name].group_size for x in mpq.graph.searched}
    assert found <= allowed
    assert {mpq.policy.bits[x.name].symmetric for x in mpq.graph.searched} == {more.get("symmetric", True)}
    if "size" in budget:
        level = LayerBits.parse(budget["size"])
        if not level.grouped:
            first = sizes[0] if isinstance(sizes, list) else sizes
            level = level.with_groups(first, more.get("symmetric", True))
        bits = mpq.policy.bits
        used = sum(layer_nbytes(x, bits[x.name]) for x in mpq.graph.searched)
        # a level without a width of inputs leaves room for their scales
        assert used <= sum(layer_nbytes(x, x.fitted(replace(level, activation=8))) for x in mpq.graph.searched)


def test_where_groups_may_be_chosen_the_best_is_no_worse():
    """At equal bytes more choices only help the sum of scores, and some layers take groups, some do not."""
    mpq = loaded()
    results = {}
    for sizes in ([16], [None, 16]):
        mpq = loaded()
        mpq.quantize(size=28000, train=BATCHES, epochs=0, validate=False, group_size=sizes)
        results[str(sizes)] = mpq.result.objective
    assert results["[None, 16]"] < results["[16]"]
    assert len({bits.group_size for bits in mpq.result.policy.bits.values()}) == 2


def test_measured_policies_are_those_that_are_applied():
    """The meter's copy computes what apply_policy makes, to the bit, with rounded weights as without."""
    mpq = loaded()
    mpq.quantize(weight_bits=3.0, train=BATCHES[:20], val=BATCHES[20:], epochs=0, group_size=16)
    graph, policy = mpq.graph, mpq.policy
    choices = {n: (b.of_weight,) for n, b in policy.bits.items()}
    rounded = rounding_module.round_weights(mpq.float_model, graph, choices, BATCHES)
    candidates = {x.name: Candidates((policy.bits[x.name].weight,), (32,), (16,)) for x in graph.searched}
    meter = PolicyMeter(mpq.float_model, graph, candidates, BATCHES, rounded=rounded)
    measured = meter.measure(policy, BATCHES[-2:])
    mpq.apply_policy(policy, BATCHES)
    task = meter.task
    values = []
    with torch.no_grad():
        for batch in BATCHES[-2:]:
            one, two = mpq.model(**batch), mpq.float_model(**batch)
            found, mask = task.divergence(one, two, None)
            values.append(found[mask])
    torch.testing.assert_close(measured, torch.cat(values).double())


def test_validated_searches_measure_rounded_weights():
    mpq = loaded()
    mpq.quantize(weight_bits=3.0, train=BATCHES, epochs=0, group_size=16, validate_seconds=60)
    assert mpq.result.strategy == "gradient"
    rows = {row.name: row for row in mpq.result.measurements}
    assert rows["optimum"].divergence > 0
    assert any(name.startswith("uniform") for name in rows)
    assert {b.group_size for n, b in rows["optimum"].policy.bits.items() if mpq.graph[n].fixed is None} == {16}


def test_a_run_that_stopped_rounds_and_scores_no_more(tmp_path, monkeypatch):
    args = {"weight_bits": 3.0, "train": BATCHES, "epochs": 0, "group_size": 16, "checkpoint_dir": tmp_path}

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hub_mpq.model.search_measured", stop)
        with pytest.raises(KeyboardInterrupt):
            loaded().quantize(**args)
    whole = loaded()
    whole.quantize(**{**args, "checkpoint_dir": None})
    with monkeypatch.context() as patch:
        patch.setattr("hub_mpq.model.train_scores", None)
        patch.setattr(rounding_module, "round_weight", None)
        again = loaded()
        again.quantize(**args, resume=True)
    assert again.policy == whole.policy
    assert again.scores.pairs == whole.scores.pairs
    a, b = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_fine_tuning_trains_scales_of_groups(tmp_path):
    mpq = loaded()
    mpq.quantize(weight_bits=3.0, train=BATCHES, steps=4, group_size=16, symmetric=False, validate=False)
    assert mpq.result.strategy == "limpq"
    layer = mpq.model.model.layers[0].mlp.up_proj
    assert type(layer.weight_quantizer).__name__ == "GroupedLSQ"
    assert float(layer.weight_quantizer.shift.detach().abs().max()) > 0
    mpq.save_pretrained(tmp_path)
    back = HubMPQ.from_pretrained(tmp_path, module=decoder())
    with torch.no_grad():
        assert torch.equal(mpq(**BATCHES[0]).logits, back(**BATCHES[0]).logits)


def test_layers_without_rows_keep_one_scale_a_channel(make_net):
    images = [torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    mpq = HubMPQ.from_module(make_net(), images[0], fixed={"*": None})
    mpq.apply_policy("W4A4", images, group_size=8)
    found = {x.kind: mpq.policy.bits[x.name].group_size for x in mpq.graph}
    assert found == {"conv2d": None, "linear": 8}
    candidates = resolve_candidates(mpq.graph, None, [None, 8], False)
    assert {x.kind: (candidates[x.name].group_size, candidates[x.name].symmetric) for x in mpq.graph} == {
        "conv2d": ((None,), True),
        "linear": ((None, 8), False),
    }


def test_scores_of_widths_serve_one_group_size_and_cannot_tell_two():
    mpq = loaded()
    names = [x.name for x in mpq.graph.searched]
    scores = Indicators({n: {2: 2.0, 3: 1.0} for n in names}, {}, {}, {"strategy": "limpq"})
    one = resolve_candidates(mpq.graph, Candidates((2, 3), (32,)), 16, False)
    table, _ = score_table(scores, mpq.graph, one)
    assert table[names[0]] == {LayerBits(2, 32, 16, False): 2.0, LayerBits(3, 32, 16, False): 1.0}
    assert candidates_of(table) == one
    assert equal_scores(mpq.graph, one)[names[0]].keys() == table[names[0]].keys()
    two = resolve_candidates(mpq.graph, Candidates((2, 3), (32,)), [16, 32])
    with pytest.raises(InvalidArgument, match="cannot choose among the group sizes"):
        score_table(scores, mpq.graph, two)
    with pytest.raises(InvalidArgument, match="several candidate group sizes"):
        mpq.train_scores(BATCHES, strategy="gradient", candidates=Candidates((2, 3), (32,), (16, 32)))


def test_a_wider_weight_never_scores_worse_within_its_groups():
    row = {LayerBits(2, 32): 1.0, LayerBits(3, 32): 3.0, LayerBits(2, 32, 16): 0.5, LayerBits(3, 32, 16): -1.0}
    assert monotone(row) == {
        **{LayerBits(2, 32): 3.0, LayerBits(3, 32): 3.0},
        **{LayerBits(2, 32, 16): 0.5, LayerBits(3, 32, 16): LEAST},
    }


def test_levels_in_words():
    assert [str(LayerBits.parse(x)) for x in ("w4G128Za8", "W4zA32", "W3g32", "A8")] == [
        *("W4g128zA8", "W4zA32", "W3g32A32"),
        "W32A8",
    ]
    for text in ("W4g4", "W1z", "W32g128A8", "W4gA8", "W4g128g64", "W4z z", "g128", "W4g9999999"):
        with pytest.raises(InvalidArgument):
            LayerBits.parse(text)
    assert str(Budget(size="W4", bitops="W4g32A8").with_groups(128, False)) == "bitops W4g32A8, size W4g128zA32"
    assert str(Budget(activation_peak="A4", size="W1").with_groups(None, False)) == "size W1, activation_peak A4"
    with pytest.raises(InvalidArgument, match="a group size must be"):
        Candidates((4,), (32,), (True,))
    assert Candidates((4,), (32,), 16) == Candidates([4], [32], [16])
    assert Candidates((4,), (32,), None) == Candidates((4,), (32,), [])
    for wrong in ((4,), ("4",), ((4,), 32)):
        with pytest.raises(InvalidArgument, match="a list of bit-widths"):
            Candidates(*wrong)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rounding": "gptq"}, "requires train="),
        ({"rounding": "awq", "train": BATCHES}, "'gptq' or 'nearest'"),
        ({"group_size": 7, "train": BATCHES}, "a group size must be"),
        ({"group_size": "128", "train": BATCHES}, "a group size must be"),
        ({"group_size": 128.0, "train": BATCHES}, "got 128.0"),
        ({"rounding": "gptq", "per_channel": False, "train": BATCHES}, "one scale per output channel"),
        ({"group_size": [None, 16], "strategy": "limpq", "train": BATCHES}, "cannot choose among the group sizes"),
        ({"group_size": [None, 16], "epochs": 1, "train": BATCHES}, "cannot choose among the group sizes"),
    ],
)
def test_what_cannot_be_costs_no_work(more, words, monkeypatch):
    monkeypatch.setattr("hub_mpq.model.round_weights", None)
    monkeypatch.setattr("hub_mpq.model.train_scores", None)
    with pytest.raises(InvalidArgument, match=words):
        loaded().quantize(**{"weight_bits": 4.0, "epochs": 0, **more})


def test_the_policy_is_told_with_its_groups():
    mpq = loaded()
    mpq.apply_policy("W4g16z", BATCHES)
    assert "W4g16z" in mpq.report()
    tree = json.loads(json.dumps(mpq.policy.to_dict()))
    assert Policy.from_dict(tree) == mpq.policy


def test_a_sequential_of_linears_takes_the_route(tmp_path):
    """No language model: rows of numbers, a regression."""
    net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    data = [(torch.randn(8, 24, generator=torch.Generator().manual_seed(i)), torch.randn(8, 3)) for i in range(24)]
    mpq = HubMPQ.from_module(net, data[0][0], weight_only=True, task="regression")
    mpq.quantize(weight_bits=3.0, train=data, epochs=0, group_size=8)
    assert mpq.save_pretrained(tmp_path) == mpq.usage()["size"]


def test_a_search_measures_what_apply_policy_would_make():
    """search(validate=) rounds by GPTQ too, where weights alone are quantized, and chooses among group sizes."""
    mpq = loaded()
    mpq.quantize(weight_bits=3.0, train=BATCHES[:16], epochs=0, group_size=[None, 16], validate=False)
    held = BATCHES[16:]
    found = mpq.search(size="W3g16", validate=held, validate_seconds=60)
    row = found.measurements[0]
    assert row.name == "optimum"
    calibration = held[:2]  # a quarter of the batches
    mpq.apply_policy(row.policy, calibration)
    task = task_of(None, mpq.float_model, held[0])
    with torch.no_grad():
        values = []
        for batch in held[3::2]:  # the reporting half of the rest
            found, mask = task.divergence(mpq.model(**batch), mpq.float_model(**batch), None)
            values.append(found[mask])
    assert row.divergence == pytest.approx(float(torch.cat(values).double().mean()), rel=1e-4)


@pytest.mark.parametrize("strategy", ["dq", "bsq"])
def test_widths_that_training_settles_on_have_the_groups_asked_for(strategy):
    mpq = HubMPQ.from_module(decoder(), BATCHES[0])
    mpq.quantize(
        strategy=strategy, train=BATCHES, epochs=0, indicator_options={"steps": 1}, group_size=16, symmetric=False
    )
    found = {(mpq.policy.bits[x.name].group_size, mpq.policy.bits[x.name].symmetric) for x in mpq.graph.searched}
    assert found == {(16, False)}
    fixed = {str(mpq.policy.bits[x.name]) for x in mpq.graph if x.fixed}
    assert fixed == {"W8A8", "W8A32"}


@pytest.mark.parametrize("target", [None, "vllm"])
def test_a_later_search_speaks_of_the_groups_that_were_scored(target, tmp_path):
    """A level and candidates without groups stand for them, in search, pareto and check_reachable alike."""
    decoder(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    mpq = HubMPQ.from_pretrained(tmp_path, weight_only=True, target=target)
    mpq.quantize(size="W4", group_size=32, train=BATCHES, epochs=0, validate=False)
    assert mpq.search(size="W4").policy == mpq.policy
    names = [x.name for x in mpq.graph.searched]
    narrow = mpq.search(size="W4", candidates=[3, 4])
    assert {str(narrow.policy.bits[name]) for name in names} == {"W4g32A32"}
    mpq.check_reachable(size="W3", candidates=[3])  # with the scales of groups it takes all of that
    front = mpq.pareto("weight_bits", 3, size="W4", candidates=[3, 4])
    assert front[-1].policy == narrow.policy
    table, _ = mpq.score_table(candidates=[3])
    assert {bits for row in table.values() for bits in row} == {LayerBits(3, 32, 32)}


@pytest.mark.parametrize(("sizes", "first"), [([None, 32], "W4"), ([32, None], "W4g32")])
def test_a_level_is_of_the_first_group_size_that_is_asked_for(sizes, first, tmp_path):
    """Also where a target's menu has an order of its own."""
    decoder(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    mpq = HubMPQ.from_pretrained(tmp_path, target="vllm")
    mpq.quantize(size="W4", group_size=sizes, train=BATCHES, epochs=0, candidates=[4, 5], validate=False)
    assert mpq.result.details["budget"] == f"size {LayerBits.parse(first) if 'g' in first else first}"


def test_plain_widths_stand_for_themselves_where_they_were_scored():
    mpq = loaded()
    mpq.quantize(size="W4", group_size=[None, 16], train=BATCHES, epochs=0, validate=False)
    table, _ = mpq.score_table(candidates=[3])
    assert {bits for row in table.values() for bits in row} == {LayerBits(3, 32)}


def test_a_front_counts_the_bytes_of_a_targets_file(tmp_path):
    decoder(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    mpq = HubMPQ.from_pretrained(tmp_path, target="gguf", exclude=["lm_head"])
    mpq.quantize(size="W4", group_size=32, train=BATCHES, epochs=0, validate=False)
    limit = mpq.result.usage["GGUF file"]
    front = mpq.pareto("weight_bits", 3, size="W4")
    assert front[-1].usage["GGUF file"] == limit < mpq.usage("W5")["GGUF file"]
    with pytest.raises(InvalidArgument, match="cannot vary the size of a"):
        mpq.pareto("size", 3)


def test_weights_that_were_rounded_otherwise_are_not_trained_on(tmp_path):
    """The policy is the same, so the state of the first run has the place of the second's."""
    args = {"size": "W4", "train": BATCHES, "group_size": 16, "candidates": [4], "steps": 2, "validate": False}
    for rounding in ("gptq", "nearest"):
        found, fresh = loaded(), loaded()
        states = {"checkpoint_dir": tmp_path, "resume": True, "finetune_options": {"checkpoint_every": 1}}
        found.quantize(**args, **states, rounding=rounding)
        fresh.quantize(**args, rounding=rounding)
        a, b = found.model.state_dict(), fresh.model.state_dict()
        assert found.policy == fresh.policy
        assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("strategy", ["gradient", "mse"])
def test_scores_say_in_which_groups_they_were_measured(strategy):
    """Also where nothing is rounded first: a later search is of the same grids, and the report has the divergences."""
    mpq = HubMPQ.from_module(decoder(), BATCHES[0])
    mpq.quantize(
        bitops="W4A6",
        **{"train": BATCHES, "epochs": 0, "strategy": strategy, "validate": False},
        **{"group_size": 16, "symmetric": False},
    )
    names = [x.name for x in mpq.graph.searched]
    assert {bits.of_weight.with_groups(16, False) == bits.of_weight for n in names for bits in mpq.scores.pairs[n]} == {
        True
    }
    assert mpq.search(bitops="W4A6").policy == mpq.policy
    assert " KL" in mpq.report().splitlines()[1]


def test_the_longest_header_has_zero_points_where_any_choice_has_them():
    graph = HubMPQ.from_module(decoder(), BATCHES[0], weight_only=True).graph
    row = dict.fromkeys(map(LayerBits.parse, ("W4g32zA32", "W8g32A32", "W8A32", "W2zA32")), 1.0)
    longest = longest_header(Policy.uniform(graph, "W2A32"), {graph.searched[0].name: row})
    assert str(longest.bits[graph.searched[0].name]) == "W4g32zA32"


def test_inferred_widths_are_of_the_menu():
    graph = HubMPQ.from_module(decoder(), BATCHES[0], weight_only=True).graph
    widths = {x.name: f"W{2 + i % 2}A32" for i, x in enumerate(graph.searched)}
    menu = Candidates(activation=(32,), menu=(LayerBits.parse("W2g16zA32"), LayerBits.parse("W3g16A32")))
    scores = Indicators({}, {}, provenance={"inferred": widths, "strategy": "dq"})
    policy = inferred_policy(graph, scores, dict.fromkeys(widths, menu))
    assert {str(policy.bits[name]) for name in widths} == {"W2g16zA32", "W3g16A32"}
