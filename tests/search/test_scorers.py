"""Post-training scorers: each formula against the plain one, regression heads, layers that nothing reaches, options."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.nn.calibrate import sample_inputs, widths_off
from hub_mpq.search.candidates import resolve_candidates
from hub_mpq.search.hessian import Hessian
from hub_mpq.search.posttraining import KL, MSE
from hub_mpq.search.sensitivity import at
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune
from hub_mpq.train.norms import batch_statistics, reestimate_batch_norm

SCORERS = ("gradient", "hessian", "mse", "kl")
ROWS = 8


def mlp():
    """Linear layers of 6, 5, 4 and 3 features; only the middle one, "2", is searched."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
        return net, (torch.randn(ROWS, 6), torch.arange(ROWS) % 3)


def measured(strategy, net, *batches, layer="2"):
    """The scorer after it has measured batches, and the sample of what the one searched layer reads."""
    mpq = HubMPQ.from_module(net, batches[0][0][:1])
    assert [x.name for x in mpq.graph.searched] == [layer]
    inputs = sample_inputs(net, batches, Classification().forward, [layer])
    rates = {"lr": 0.0, "scale_lr": 0.0, "weight_decay": 0.0, "smoothing": 0.0}
    strategy.loss = Finetune(task=Classification(), **rates)
    strategy.attach(net, mpq.graph, resolve_candidates(mpq.graph, [2, 4]), {})
    strategy.calibrate(net, list(batches), inputs)
    return strategy, inputs[layer]


def errors(strategy, x):
    """(‖Q(W) − W‖² of layer "2", ‖Q(x) − x‖² of what it reads), {bits: …} each."""
    layer, out = strategy.layers["2"], []
    with torch.no_grad():
        for quantizer, tensor in ((layer.weight_quantizer, layer.weight), (layer.input_quantizer, x[None])):
            row = {}
            for bits in (2, 4):
                with at(quantizer, bits):
                    row[bits] = float((quantizer(tensor) - tensor).double().square().sum())
            out.append(row)
    return out


def divergence(net, x, reference):
    """Mean KL over samples from the log-probabilities of a float net."""
    moved = F.log_softmax(net(x).detach(), -1)
    return float((reference.exp() * (reference - moved)).sum(1).mean())


def test_mse_is_the_squared_error_over_the_power_in_units_of_the_measured_divergence():
    net, batch = mlp()
    plain = F.log_softmax(net(batch[0]).detach(), -1)
    mse, x = measured(MSE(), net, batch)
    layer = mse.layers["2"]
    with widths_off(net), at(layer.weight_quantizer, 2), at(layer.input_quantizer, 2):
        whole = divergence(net, batch[0], plain)
    assert mse.weight["2"][2] + mse.activation["2"][2] == pytest.approx(whole, rel=1e-4)
    weight, activation = errors(mse, x)
    powers = float(net[2].weight.detach().double().square().sum()), float(x.double().square().sum())
    for bits in (2, 4):
        assert mse.weight["2"][bits] == pytest.approx(mse.factor * weight[bits] / powers[0], rel=1e-5)
        assert mse.activation["2"][bits] == pytest.approx(mse.factor * activation[bits] / powers[1], rel=1e-5)


def test_hessian_is_half_the_mean_trace_times_the_squared_error():
    net, (x, labels) = mlp()
    with torch.no_grad():
        net[4].weight.mul_(4)  # a trace that stands out of the estimate's noise
    weight, bias = net[2].weight.detach().clone(), net[2].bias.detach()
    hidden = torch.tanh(net[0](x)).detach()
    plain = F.log_softmax(net(x).detach(), -1)
    w, a = weight.numel(), hidden.numel()

    def loss(flat):
        read = hidden + flat[w:].view_as(hidden)
        out = F.linear(read, weight + flat[:w].view_as(weight), bias)
        moved = F.log_softmax(net[4](torch.tanh(out)), -1)
        return (plain.exp() * (plain - moved)).sum(1).mean()

    hessian = torch.autograd.functional.hessian(loss, torch.zeros(w + a)).double()
    probes = 1000
    found, read = measured(Hessian(probes=probes), net, (x, labels))
    # the mean of vᵀHv misses the trace by the entries beside the diagonal, the other operand's among them:
    # its variance is 2·Σ of their squares in the own block, 1·Σ in the other
    beside = (hessian - hessian.diag().diag()).square()
    for i, part in enumerate((slice(0, w), slice(w, None))):
        exact, block = float(hessian.diag()[part].sum()), float(beside[part, part].sum())
        deviation = math.sqrt((block + float(beside[part].sum())) / probes)
        assert found.traces["2"][i] == pytest.approx(exact, abs=4 * deviation)
        assert 8 * deviation < exact  # the bound could tell 1 or a half from the trace
    noise, moved = errors(found, read)
    for bits in (2, 4):
        assert found.weight["2"][bits] == pytest.approx(0.5 * found.traces["2"][0] / w * noise[bits], rel=1e-5)
        # one sample reads 5 numbers of the 40; its trace is the batch's, the loss being a mean
        assert found.activation["2"][bits] == pytest.approx(
            0.5 * found.traces["2"][1] / 5 * moved[bits] / ROWS, rel=1e-5
        )


@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_hessian_predicts_the_divergence_of_a_random_error_of_that_size(operand):
    """½·trace(H)/n·‖Δ‖² is the mean of ½·ΔᵀHΔ over directions: slope 1 against measured divergences."""
    net, (x, labels) = mlp()
    net, x = net.double(), x.double()
    found, read = measured(Hessian(probes=1000), net, (x, labels))
    score = getattr(found, operand)["2"][4]
    size = errors(found, read)[operand == "activation"][4]
    generator, rows = torch.Generator().manual_seed(0), []
    with torch.no_grad(), widths_off(net):
        plain, hidden = F.log_softmax(net(x), -1), torch.tanh(net[0](x))
        for _ in range(500):
            wanted = net[2].weight if operand == "weight" else hidden
            error = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
            # small enough for the second order; both sides scale with its square
            error *= 0.1 * size**0.5 / error.norm()
            pair = (hidden, net[2].weight + error) if operand == "weight" else (hidden + error, net[2].weight)
            y = F.linear(*pair, net[2].bias)
            moved = F.log_softmax(net[4](torch.tanh(y)), -1)
            rows.append(100 * float((plain.exp() * (plain - moved)).sum(1).mean()))
    measurement = torch.tensor(rows)
    # four standard errors of the measured mean and as much for the 1000 probes
    assert score == pytest.approx(float(measurement.mean()), abs=8 * float(measurement.std()) / 500**0.5)
    assert 8 * float(measurement.std()) / 500**0.5 < 0.5 * score  # one half would be told from one


class Twice(nn.Module):
    """A layer that reads the same input twice, so that its two runs count alike."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(10, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(torch.cat([self.layer(x), self.layer(x)], -1))


def test_hessian_takes_in_all_runs_of_a_layer():
    torch.manual_seed(0)
    net, x, found = Twice(), torch.randn(64, 6), []
    for used in (slice(0, 10), slice(0, 5), slice(5, 10)):
        part = copy.deepcopy(net)
        with torch.no_grad():
            kept = torch.zeros_like(part.last.weight)
            kept[:, used] = part.last.weight[:, used]
            # the classes' probabilities stay those of the whole
            part.last.weight.copy_(kept)
            rest = net.last.weight - kept
            part.last.register_forward_hook(lambda _m, args, y, rest=rest: y + args[0].detach() @ rest.T.detach())
        scorer, _ = measured(Hessian(probes=400), part, (x, torch.zeros(64).long()), layer="layer")
        found.append(scorer.traces["layer"][1])
    both, first, second = found
    assert both == pytest.approx(first + second, rel=0.1)
    assert 0.2 < first / second < 5


@pytest.mark.parametrize(("name", "unit"), [(n, u) for n in ("hessian", "mse", "kl") for u in ("kl", "target_error")])
def test_the_unit_is_the_divergences(name, unit, net, train):
    if unit == "kl":
        mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8))
    else:
        model, ids, _ = regression()
        mpq, train = HubMPQ.from_module(model, {"input_ids": ids[:1]}), [{"input_ids": ids}]
    assert mpq.train_scores(train, strategy=name, candidates=[2, 6]).unit == unit


def test_batches_of_unequal_sizes_count_by_their_items():
    net, (x, labels) = mlp()
    whole, _ = measured(KL(), net, (x, labels))
    net, _ = mlp()
    cut, _ = measured(KL(batches=2), net, (x[:2], labels[:2]), (x[2:], labels[2:]))
    for rows, wanted in ((cut.weight, whole.weight), (cut.activation, whole.activation)):
        assert rows["2"] == pytest.approx(wanted["2"], rel=1e-4)


def test_kl_normalises_by_the_batch_as_a_policy_will():
    """A BatchNorm that a policy re-estimates takes back what quantization does to a channel's mean and deviation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).eval()
        x, labels = torch.randn(64, 6), torch.arange(64) % 5
    net[2].running_mean.fill_(1.0)  # fresh statistics count as folded
    reestimate_batch_norm(net, [(x, labels)])
    kl, _ = measured(KL(), net, (x, labels), layer="1")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad(), widths_off(net):
        with batch_statistics(net):
            plain = F.log_softmax(net(x), -1)
            with at(kl.layers["1"].weight_quantizer, 2):
                found = divergence(net, x, plain)
        with at(kl.layers["1"].weight_quantizer, 2):
            running = divergence(net, x, plain)
            reestimate_batch_norm(net, [(x, labels)])
            again = divergence(net, x, plain)
    assert kl.weight["1"][2] == pytest.approx(found, rel=1e-4)
    assert found == pytest.approx(again, rel=0.05)  # but for the unbiased variance
    assert abs(running / found - 1) > 0.1
    with batch_statistics(net):
        assert net[2].training
        net(x)
    net.load_state_dict(before)
    with batch_statistics(net):
        net(3 * x)
    assert not net[2].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_kl_is_the_divergence_of_the_classes():
    net, batch = mlp()
    plain = F.log_softmax(net(batch[0]).detach(), -1)
    kl, _ = measured(KL(), net, batch)
    layer = kl.layers["2"]
    for row, quantizer in ((kl.weight, layer.weight_quantizer), (kl.activation, layer.input_quantizer)):
        for bits in (2, 4):
            with widths_off(net), at(quantizer, bits):
                moved = F.log_softmax(net(batch[0]).detach(), -1)
            assert row["2"][bits] == pytest.approx(float((plain.exp() * (plain - moved)).sum(1).mean()), rel=1e-4)


def regression():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=1,
        max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval(), torch.randint(30, (16, 8)), torch.randn(16)


# the model's own loss, which "gradient" and "hessian" take, knows no whole numbers here
@pytest.mark.parametrize(
    ("name", "labels"), [(n, x) for n in SCORERS for x in ("float", "none")] + [("mse", "whole"), ("kl", "whole")]
)
def test_a_regression_head_has_scores(name, labels):
    """One output has no classes: a softmax over it is 1 whatever the widths are."""
    model, ids, target = regression()
    mpq = HubMPQ.from_module(model, {"input_ids": ids[:1]})
    given = {"float": {"labels": target}, "whole": {"labels": target.round().long()}, "none": {}}[labels]
    found = mpq.train_scores([{"input_ids": ids, **given}], strategy=name, candidates=[2, 6])
    narrow, wide = (sum(row[f(row)] for row in found.pairs.values()) for f in (min, max))  # W2A2, W6A6
    assert narrow > 2 * wide > 0


class Branch(nn.Module):
    """Layer "b" runs on single samples only: never on a calibration batch."""

    def __init__(self):
        super().__init__()
        self.e, self.a, self.b, self.h = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.a(self.e(x))
        return self.h(self.b(x) if x.shape[0] == 1 else x)


@pytest.mark.parametrize("name", SCORERS)
def test_a_layer_that_nothing_reaches_keeps_all_its_choices(name):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    mpq = HubMPQ.from_module(Branch().eval(), x[:1])
    found = mpq.train_scores([(x, torch.arange(32) % 5)], strategy=name, candidates=[2, 3, 4])
    assert {(b.weight, b.activation) for b in found.pairs["b"]} == {(w, a) for w in (2, 3, 4) for a in (2, 3, 4)}


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("batches", [0, -1, 2.5, "2", True])
def test_a_number_of_batches_is_a_whole_number(name, batches, net, train):
    with pytest.raises(InvalidArgument, match=f"batches must be an integer of at least 1, got {batches!r}"):
        HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).train_scores(
            train, strategy=name, strategy_options={"batches": batches}
        )


@pytest.mark.parametrize("probes", [0, -1, 2.5, "8"])
def test_a_number_of_probes_is_a_whole_number(probes, net, train):
    with pytest.raises(InvalidArgument, match=f"probes must be an integer of at least 1, got {probes!r}"):
        HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).train_scores(
            train, strategy="hessian", strategy_options={"probes": probes}
        )
