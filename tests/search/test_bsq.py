"""BSQ: the penalty's formula, every budget that can be met is met, ties without a budget, options."""

import copy
import math

import pytest
import torch
from torch import nn

from hub_mpq import Candidates, HubMPQ, LayerBits, Policy
from hub_mpq.errors import InfeasibleBudget, InvalidArgument
from hub_mpq.quantizers import weight_scale_mse
from hub_mpq.search.bsq import BSQ
from hub_mpq.search.candidates import resolve_candidates

X = torch.zeros(1, 1, 8, 8)


class Attention(nn.Module):
    """q, k and v read one input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) * self.k(x) + self.v(x))


def attention():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), Attention(), nn.Linear(8, 5)).eval()
        return net, [(torch.randn(16, 8), torch.arange(16) % 5)]


def attached(net, **options):
    mpq = HubMPQ.from_module(net, X)
    bsq = BSQ(**options)
    bsq.attach(copy.deepcopy(net), mpq.graph, resolve_candidates(mpq.graph, None), {})
    return mpq, bsq


def test_the_penalty_is_the_papers_sum(net):
    """Σ_l (#Para_l·#Bit_l/#Para)·Σ_i sqrt(‖[p_i; n_i]‖² + 1e-8), with layers of unequal sizes and bits."""
    mpq, bsq = attached(net, planes=5)
    generator = torch.Generator().manual_seed(0)
    for i, tensor in enumerate(bsq.tensors.values()):
        with torch.no_grad():
            tensor.planes[:, :i] = 0  # one layer loses no plane, one a plane, one two
            tensor.requantize()
            tensor.planes += 0.3 * torch.randn(tensor.planes.shape, generator=generator)  # dropped ones too
        tensor.clip()
    total = sum(mpq.graph[name].weight_count for name in bsq.tensors)
    want, seen = 0.0, set()
    for i, (name, tensor) in enumerate(bsq.tensors.items()):
        bits = 6 - i
        norms = 0.0
        for plane in range(i, 5):
            both = [*tensor.planes[0, plane].flatten().tolist(), *tensor.planes[1, plane].flatten().tolist()]
            norms += math.sqrt(sum(v * v for v in both) + 1e-8)
        want += mpq.graph[name].weight_count * bits / total * norms
        seen.add((mpq.graph[name].weight_count, bits))
    assert len(seen) == 3
    assert float(bsq.penalty().detach()) == pytest.approx(want, rel=1e-5)


def test_the_penalty_is_beside_the_task_with_its_strength(net, data):
    _, bsq = attached(net, strength=0.25)
    batch = (data.tensors[0][:4], data.tensors[1][:4])

    class Task:
        def loss(self, model, batch):
            return torch.tensor(2.0)

    bsq.loss = Task()
    ((loss, groups),) = bsq.losses(net, batch, None)
    assert float(loss.detach()) == pytest.approx(2.0 + 0.25 * float(bsq.penalty().detach()))
    assert groups is None


def test_scores_are_the_error_of_rounding_what_the_planes_hold(net):
    """A few large elements leave nearly all energy to the planes that 2 and 3 bits cut; rounding loses far less."""
    with torch.no_grad():
        net[3].weight[:, 0, 0, 0] *= 6
    _, bsq = attached(net)
    held = bsq.tensors["3"](net[3].weight).detach()
    scores = bsq.scores(None)["3"]
    for bits in (2, 3, 6):
        scale = weight_scale_mse(held, bits).view(-1, 1, 1, 1)
        codes = (held / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = float((codes * scale - held).square().sum() / held.square().sum())
        assert scores[LayerBits(bits, bsq.activation["3"])] == pytest.approx(error, rel=1e-4)
    assert scores[LayerBits(2, bsq.activation["3"])] < 0.4


def test_emptied_planes_make_a_narrow_width_free(net):
    """What the lasso has emptied at the bottom costs nothing to leave out."""
    _, bsq = attached(net)
    with torch.no_grad():
        codes = torch.randint(-1, 2, net[3].weight.shape, generator=torch.Generator().manual_seed(0))
        codes[:, 0, 0, 0] = 1
        bsq.tensors["3"].planes.zero_()
        bsq.tensors["3"].planes[0, 5], bsq.tensors["3"].planes[1, 5] = (codes > 0).float(), (codes < 0).float()
    scores, width = bsq.scores(None), bsq.activation["3"]
    assert scores["3"][LayerBits(2, width)] < 1e-6 < scores["6"][LayerBits(2, width)]


def met(mpq, train, budget, **more):
    mpq.train_scores(train, strategy="bsq", steps=1, budget=budget, **more)
    return mpq.search(**budget)


def test_weight_candidates_count_when_the_activation_width_is_chosen(net, train):
    mpq = HubMPQ.from_module(net, X)
    result = met(mpq, train, {"bitops": "W6A2"}, candidates=Candidates((6,), (2, 3)))
    assert {str(result.policy.bits[x.name]) for x in mpq.graph.searched} == {"W6A2"}


def test_candidates_of_their_own_a_layer_meet_the_least_budget(net, train):
    mpq = HubMPQ.from_module(net, X)
    first, second, third = (x.name for x in mpq.graph.searched)
    fixed = {x.name: x.fixed for x in mpq.graph if x.fixed}
    least = {first: LayerBits(4, 4), second: LayerBits(2, 2), third: LayerBits(4, 4)}
    cap = mpq.usage(Policy({**fixed, **least}, mpq.graph.digest))["bitops"]
    candidates = {first: [4, 5], second: [2, 3], third: [4, 5]}
    assert met(mpq, train, {"bitops": cap}, candidates=candidates).usage["bitops"] == cap


def test_a_cost_of_the_users_is_met(net, train):
    mpq = HubMPQ.from_module(net, X)
    table = {
        x.name: {f"W{w}A{a}": float(x.macs * w * a) for w in range(2, 7) for a in range(2, 7)}
        for x in mpq.graph.searched
    }
    cap = sum(9.0 * x.macs for x in mpq.graph.searched)
    assert met(mpq, train, {"costs": {"ms": (cap, table)}}).usage["ms"] <= cap


@pytest.mark.parametrize("budget", ["W4A4", None])
def test_layers_of_one_input_with_candidates_of_their_own_keep_one_activation_width(budget):
    net, train = attention()
    mpq = HubMPQ.from_module(net, train[0][0][:1])
    candidates = {"1.q": [2, 3], "1.k": [3, 4], "1.v": [3, 4]}
    options = {"strategy": "bsq", "train": train, "epochs": 0, "candidates": candidates}
    mpq.quantize(**options, indicator_options={"steps": 1}, **({"bitops": budget} if budget else {}))
    assert {mpq.policy.bits[f"1.{name}"].activation for name in "qkv"} == {3}


def test_layers_of_one_input_without_a_common_candidate_are_refused():
    net, train = attention()
    mpq = HubMPQ.from_module(net, train[0][0][:1])
    candidates = {"1.q": [2, 3], "1.k": [4, 5]}
    for strategy in ("bsq", "dq"):
        with pytest.raises(InvalidArgument, match=r"1\.q.*no common candidate"):
            mpq.train_scores(train, strategy=strategy, steps=1, candidates=candidates)
    mpq.train_scores(train, strategy="mse", candidates=candidates)
    with pytest.raises(InvalidArgument, match=r"1\.q.*no common candidate"):
        mpq.search(bitops="W4A4")


def test_an_activation_width_beyond_the_budget_falls_to_what_fits(net, train):
    mpq = HubMPQ.from_module(net, X)
    result = met(mpq, train, {"bitops": "W2A2"}, strategy_options={"activation_bits": 6})
    assert {str(result.policy.bits[x.name]) for x in mpq.graph.searched} == {"W2A2"}


def test_one_search_serves_narrower_budgets_and_keeps_the_trained_width_where_it_fits(net, train):
    mpq = HubMPQ.from_module(net, X)
    mpq.train_scores(train, strategy="bsq", steps=1, budget={"bitops": "W4A4"})
    for level in ("W4A4", "W3A4", "W2A4"):
        policy = mpq.search(bitops=level).policy
        assert {policy.bits[x.name].activation for x in mpq.graph.searched} == {4}
    cap = mpq.usage("W2A4")["bitops"] - 1  # one layer must give way, and gives one bit
    widths = [mpq.search(bitops=cap).policy.bits[x.name].activation for x in mpq.graph.searched]
    assert sorted(widths) == [3, 4, 4]
    assert mpq.search(bitops="W2A2").usage["bitops"] == mpq.usage("W2A2")["bitops"]
    with pytest.raises(InfeasibleBudget):
        mpq.search(bitops=mpq.usage("W2A2")["bitops"] - 1)


def test_inferred_widths_break_no_tie(monkeypatch):
    net, train = attention()
    mpq = HubMPQ.from_module(net, train[0][0][:1], tie_fused=True)
    plain = BSQ.inferred

    def emptied(self, model):
        with torch.no_grad():
            self.tensors["1.v"].planes[:, :5] = 0
        self.requantize()
        assert self.tensors["1.v"].bits == 3
        return plain(self, model)

    monkeypatch.setattr(BSQ, "inferred", emptied)
    mpq.quantize(strategy="bsq", train=train, epochs=0, indicator_options={"steps": 1})
    assert {str(mpq.policy.bits[f"1.{name}"]) for name in "qkv"} == {"W6A6"}


def test_a_carry_beyond_eight_bits_is_the_widest_candidate(net):
    _, bsq = attached(net)
    for tensor in bsq.tensors.values():
        with torch.no_grad():
            tensor.planes[0, :7].view(7, -1)[:, 0] = 2.0
            tensor.planes[1, :7].view(7, -1)[:, 0] = 0.0
        tensor.requantize()
        assert tensor.bits == 9
    assert {b.weight for b in bsq.inferred(net).values()} == {6}


def test_planes_are_clipped_every_step_and_requantized_every_so_many(net):
    _, bsq = attached(net, every=2)
    planes = [tensor.planes for tensor in bsq.tensors.values()]
    with torch.no_grad():
        for p in planes:
            p[:, :3] += 0.4
            p[0, 0] -= 9.0
    bsq.after_step(net, 0)
    assert all(p.min() >= 0 and 1 < p.max() <= 2 for p in planes)
    bsq.after_step(net, 1)
    assert all(set(p.unique().tolist()) == {0.0, 1.0} for p in planes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"planes": 2.5}, "planes .* from 1 to 7, got 2.5"),
        ({"planes": "7"}, "planes .* got '7'"),
        ({"every": "x"}, "every must be an integer of at least 1, got 'x'"),
        ({"every": 0}, "every .* got 0"),
        ({"activation_bits": "a"}, "activation_bits must be an integer from 1 to 8, got 'a'"),
        ({"activation_bits": True}, "activation_bits .* got True"),
        ({"activation_bits": 40}, "activation_bits .* got 40"),
        ({"strength": "high"}, "strength must be a finite number of at least 0, got 'high'"),
        ({"plane_lr": -1.0}, "plane_lr .* got -1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, match):
    with pytest.raises(InvalidArgument, match=match):
        BSQ(**options)
