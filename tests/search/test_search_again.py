"""A second search on one model, what a search leaves in the packed file, and what is refused before any training."""

import copy

import pytest
import torch
from torch import nn

from hub_mpq import Candidates, HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.search import strategy as registry
from hub_mpq.search.strategy import strategy_named

X = torch.zeros(1, 1, 8, 8)
BUILT_IN = ("limpq", "dq", "ebs", "seam", "bsq", "gradient", "hessian", "mse", "kl")
QUICK = {"epochs": 0, "indicator_options": {"steps": 1}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"strategy": "mse", "candidates": [2, 3]}, {"strategy": "gradient", "candidates": [4, 5]}),
        ({"strategy": "mse", "candidates": [4, 5]}, {"strategy": "limpq", "candidates": [2, 3]}),
        ({"strategy": "limpq", "candidates": [4, 5]}, {"strategy": "mse", "candidates": [2, 3]}),
    ],
)
def test_the_second_search_is_not_judged_by_the_first(net, train, first, second):
    mpq = HubMPQ.from_module(net, X)
    for asked in (first, second):
        low, high = asked["candidates"]
        mpq.quantize(train=train, bitops=f"W{low}A{high}", **QUICK, **asked)
        assert {b.weight for n, b in mpq.policy.bits.items() if mpq.graph[n].fixed is None} <= {low, high}


@pytest.mark.parametrize("strategy", ["dq", "bsq"])
def test_a_size_holds_for_many_layers_with_long_names(strategy, tmp_path):
    long = nn.ModuleDict({f"a_rather_long_name_of_a_block_number_{i}": nn.Linear(8, 8) for i in range(70)})

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = long, nn.Linear(8, 4)

        def forward(self, x):
            for block in self.blocks.values():
                x = x + block(x).relu()
            return self.head(x)

    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    mpq = HubMPQ.from_module(Deep(), x[:1])
    before, cap = mpq.base_bytes(), int(mpq.usage("W3A3")["size"])
    mpq.quantize(strategy=strategy, size=cap, train=[(x, torch.arange(16) % 4)], **QUICK)
    assert mpq.base_bytes() == before
    assert mpq.save_pretrained(tmp_path) == mpq.usage()["size"] <= cap


def test_two_searches_of_one_seed_write_the_same_file(net, train, tmp_path):
    packed = []
    for name in ("a", "b"):
        mpq = HubMPQ.from_module(copy.deepcopy(net), X)
        mpq.quantize(strategy="dq", bitops="W3A3", train=train, **QUICK).save_pretrained(tmp_path / name)
        packed.append((tmp_path / name / "model.mpq.safetensors").read_bytes())
    assert packed[0] == packed[1]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"strategy": "ebs"}, "no budget"),
        ({"strategy": "mse", "bitops": "W3A3", "indicator_options": {"preset": "authors"}}, "preset is an option of"),
        ({"bitops": "W3A3", "indicator_options": {"epoch": 1}}, "no option 'epoch'; did you mean 'epochs'"),
        ({"bitops": "W3A3", "finetune_options": {"learning_rate": 1}}, "no option 'learning_rate'"),
        ({"bitop": "W3A3"}, "unknown option or limit 'bitop'; did you mean 'bitops'"),
        ({"bitops": "W3A3", "strategy_options": {"unifrom": False}}, "options of strategy 'limpq'.*unifrom"),
        ({"strategy": "mse", "bitops": "W3A3", "alpha": 2.0}, "alpha"),
        ({"strategy": "mse", "bitops": "W3A3", "fixed": {"*": "W4A4"}}, "nothing to search"),
    ],
)
def test_what_would_do_nothing_is_refused(net, train, asked, words):
    with pytest.raises(InvalidArgument, match=words):
        HubMPQ.from_module(net, X).quantize(train=train, **{**QUICK, **asked})


def test_limpq_takes_its_options_as_every_strategy_does(net, train):
    """By `strategy_options` as by `indicator_options`: there is one driver."""
    found = []
    for asked in ({"strategy_options": {"indicator": "scale"}}, {"indicator_options": {"indicator": "scale"}}):
        mpq = HubMPQ.from_module(net, X)
        options = {"steps": 1, **asked.get("indicator_options", {})}
        found.append(mpq.train_scores(train, options, strategy_options=asked.get("strategy_options")))
    assert found[0].weight == found[1].weight
    assert found[0].provenance["indicator"] == "scale"


@pytest.mark.parametrize("strategy", ["dq", "ebs", "bsq", "hessian", "mse"])
def test_a_model_of_fixed_layers_is_refused_in_words(net, train, strategy):
    mpq = HubMPQ.from_module(net, X, fixed={"*": "W4A4"})
    with pytest.raises(InvalidArgument, match="nothing to search"):
        mpq.train_scores(train, strategy=strategy, steps=1)


def test_no_budget_is_refused_before_the_search(net):
    class Untouched:
        def __iter__(self):
            raise AssertionError("the data were read")

    with pytest.raises(InvalidArgument, match="no budget"):
        HubMPQ.from_module(net, X).quantize(strategy="ebs", train=Untouched(), **QUICK)


def test_a_search_without_data_warns(net):
    with pytest.warns(UserWarning, match="no training data"):
        HubMPQ.from_module(net, X).quantize(strategy="mse", bitops="W3A3")


def test_a_checkpoint_of_another_search_is_not_taken(net, train, tmp_path):
    class Stopped:
        def __iter__(self):
            yield next(iter(train))
            yield next(iter(train))
            raise KeyboardInterrupt

    def quantized(data, options, **more):
        options_of_search = {"strategy_options": options, "indicator_options": {"steps": 4, "checkpoint_every": 1}}
        mpq = HubMPQ.from_module(copy.deepcopy(net), X)
        return mpq.quantize(strategy="dq", bitops="W3A3", train=data, epochs=0, **options_of_search, **more)

    with pytest.raises(KeyboardInterrupt):
        quantized(Stopped(), {}, checkpoint_dir=tmp_path)
    for options in ({"grid": "power-of-two"}, {"parametrization": "bits-step"}):
        again = quantized(train, options, checkpoint_dir=tmp_path, resume=True)
        assert again.scores.pairs == quantized(train, options).scores.pairs


def test_a_name_is_given_once(monkeypatch):
    monkeypatch.setattr(registry.strategies, "_found", {name: strategy_named(name) for name in BUILT_IN})
    for name in BUILT_IN:
        with pytest.raises(InvalidArgument, match="is a built-in strategy of hub_mpq"):
            registry.register_strategy(name)(type("Own", (registry.SearchStrategy,), {}))
    registry.register_strategy("mine")(type("Mine", (registry.SearchStrategy,), {}))
    with pytest.raises(InvalidArgument, match="is already registered"):
        registry.register_strategy("mine")(type("Other", (registry.SearchStrategy,), {}))


@pytest.mark.parametrize("text", ["def broken(:", "1 / 0"])
def test_a_broken_file_is_one_sentence(tmp_path, text):
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(InvalidArgument, match="cannot import the source"):
        strategy_named(f"{file}:own")


@pytest.mark.parametrize("scores", [{}, {"3": {"W4A4": 1.0}}])
def test_scores_that_the_solver_could_not_read(net, train, monkeypatch, scores):
    def attach(self, model, graph, candidates, norms):
        pass

    own = {"trains": False, "attach": attach, "scores": lambda self, model: scores}
    strategy = type("Own", (registry.SearchStrategy,), {"name": "own", **own})
    monkeypatch.setattr(registry.strategies, "_found", {"own": strategy})
    with pytest.raises(InvalidArgument, match=r"scores of strategy .* must be"):
        HubMPQ.from_module(net, X).quantize(strategy="own", train=train, bitops="W3A3", candidates=Candidates((2, 3)))
