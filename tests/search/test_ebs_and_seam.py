"""EBS's passes and SEAM's loss, proxy, head and resume; what both refuse."""

import copy
import random
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.search.candidates import resolve_candidates
from hub_mpq.search.ebs import EBS, NETWORK, falling
from hub_mpq.search.seam import SEAM, margin_loss
from hub_mpq.tasks import Classification
from hub_mpq.train.finetune import Finetune

X = torch.zeros(1, 1, 8, 8)


def others(**more):
    """Batches of nine classes; the head of `net` has five."""
    x = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, torch.arange(48) % 9), batch_size=16, **more)


def attached(strategy, net, batch, names=("3", "6", "9")):
    """`strategy` on a copy of `net`, ready for its losses."""
    mpq, student = HubMPQ.from_module(net, X), copy.deepcopy(net)
    strategy.loss = Finetune(task=Classification(), lr=1e-4, scale_lr=1e-2, weight_decay=0.0, smoothing=0.1)
    strategy.attach(student, mpq.graph, resolve_candidates(mpq.graph, [2, 3, 5]), {})
    strategy.calibrate(student, [batch], {name: torch.rand(64) for name in names})
    return student


@pytest.mark.parametrize(
    ("update", "first"), [("bilevel", NETWORK), ("mixed", (*NETWORK, "strengths"))], ids=["bilevel", "mixed"]
)
def test_weights_learn_on_one_half_and_strengths_on_the_other(update, first, net, data, monkeypatch):
    train, held = data[:16], data[16:32]
    ebs = EBS(update=update, balance=0.5)
    student = attached(ebs, net, train)
    read, plain = [], EBS.task

    def task(self, model, batch):
        read.append(batch)
        return plain(self, model, batch)

    monkeypatch.setattr(EBS, "task", task)
    passes = [(float(loss.detach()), groups) for loss, groups in ebs.losses(student, (train, held), random.Random(0))]
    assert [groups for _, groups in passes] == [first, "strengths", "prices"]
    assert read[0] is train
    assert read[1] is held
    weight = 0.5 if update == "mixed" else 1.0
    assert passes[1][0] == pytest.approx(weight * float(plain(ebs, student, held).detach()), rel=1e-5)


def test_seam_adds_the_margin_loss_of_what_the_head_reads(net, data):
    x, y = batch = data[:16]
    seam = SEAM(proxy=1.0, discriminability=3.0, margin=-0.5)
    student = attached(seam, net, batch)
    losses = seam.losses(student, batch, random.Random(0))
    found, groups = next(losses)
    features = []
    handle = student[-1].register_forward_pre_hook(lambda _m, args: features.append(args[0]))
    task = F.cross_entropy(student(x), y, label_smoothing=0.1)
    handle.remove()
    margin = margin_loss(features[0], y, -0.5)
    assert float(margin.detach()) > 0.1
    torch.testing.assert_close(found, task + 3.0 * margin)
    assert groups == (*NETWORK, "strengths")


class Recorded(Dataset):
    def __init__(self, data):
        self.data, self.targets, self.read = data, data.tensors[1].tolist(), set()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.read.add(i)
        return self.data[i]


def test_seam_reads_its_share_of_every_class_and_no_more(net, data):
    found = Recorded(data)
    mpq = HubMPQ.from_module(net, X)
    train = DataLoader(found, batch_size=16, shuffle=True)
    mpq.train_scores(train, strategy="seam", strategy_options={"proxy": 0.25, "per_class": 4}, epochs=6)
    counts = data.tensors[1].bincount(minlength=5)
    read = data.tensors[1][sorted(found.read)].bincount(minlength=5)
    assert read.tolist() == [round(0.25 * int(n)) for n in counts]


LOADERS = {
    "in order": lambda: others(),
    "shuffled": lambda: others(shuffle=True, generator=torch.Generator().manual_seed(4)),
    "list": lambda: list(others()),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_proxy_loader_interrupted_and_resumed_equals_uninterrupted(kind, net, train, tmp_path, monkeypatch):
    def search(**more):
        options = {"proxy": LOADERS[kind](), "warmup": 2}
        mpq = HubMPQ.from_module(copy.deepcopy(net), X)
        budget = {"bitops": "W3A3"}
        return mpq.train_scores(train, strategy="seam", strategy_options=options, steps=6, budget=budget, **more).pairs

    whole, plain = search(), SEAM.after_step

    def interrupted(self, model, step):
        plain(self, model, step)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SEAM, "after_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="step 4"):
        search(checkpoint_dir=tmp_path)
    monkeypatch.setattr(SEAM, "after_step", plain)
    assert search(checkpoint_dir=tmp_path, resume=True) == whole


def test_the_warm_up_leaves_no_gradient(net, data):
    seam = SEAM(proxy=others(), warmup=2)
    seam.loader([])
    student = attached(seam, net, data[:16])
    assert student[-1].out_features == 9
    assert float(student[-1].bias.detach().abs().max()) > 0  # it was trained
    assert all(p.grad is None for p in student.parameters())


def test_a_proxy_that_can_be_read_once_is_refused(net, data, train):
    with pytest.raises(InvalidArgument, match="iterator"):
        SEAM(proxy=(batch for batch in others()))

    class Once:
        def __init__(self):
            self.batches = iter(list(others()))

        def __iter__(self):
            return self.batches

    mpq = HubMPQ.from_module(net, X)
    with pytest.raises(InvalidArgument, match="read again"):
        mpq.train_scores(train, strategy="seam", strategy_options={"proxy": Once()}, steps=1)


@pytest.mark.parametrize("proxy", [0.5, "loader"])
def test_without_its_classifier_in_the_graph_seam_is_refused(proxy, net, train):
    options = {"proxy": others() if proxy == "loader" else proxy}
    deep = nn.Sequential(nn.Flatten(), *(m for _ in range(3) for m in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 5))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), *(nn.Linear(5, 5) for _ in range(3)))  # all like the logits
    for model, head in ((net, "13"), (deep, "7"), (wide, "4")):
        mpq = HubMPQ.from_module(model, X, exclude=[head])
        with pytest.raises(InvalidArgument, match="do not exclude the classifier"):
            mpq.train_scores(train, strategy="seam", strategy_options=options, steps=1)


def test_a_searched_head_is_kept_with_a_share_and_refused_with_a_loader(net, train):
    mpq = HubMPQ.from_module(net, X, fixed={"13": None})
    assert "13" in mpq.train_scores(train, strategy="seam", strategy_options={"proxy": 0.5}, steps=1).pairs
    with pytest.raises(InvalidArgument, match="'13' must have fixed bit-widths"):
        mpq.train_scores(train, strategy="seam", strategy_options={"proxy": others()}, steps=1)


def test_seam_does_not_distil(net, train):
    mpq = HubMPQ.from_module(net, X)
    with pytest.raises(InvalidArgument, match="distill"):
        mpq.train_scores(train, strategy="seam", strategy_options={"proxy": 0.5}, distill=0.7, steps=1)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("ebs", {"temperature": 0, "gumbel": True}, "temperature"),
        ("ebs", {"temperature": -1.0}, "temperature"),
        ("ebs", {"strength_lr": "a"}, "strength_lr"),
        ("ebs", {"strength": float("nan")}, "strength"),
        ("ebs", {"balance": None, "update": "mixed"}, "balance"),
        ("seam", {"temperature": 0}, "temperature"),
        ("seam", {"proxy": None}, "proxy"),
        ("seam", {"proxy": "/a/folder"}, "proxy"),
        ("seam", {"proxy": True}, "proxy"),
        ("seam", {"proxy": 0}, "proxy"),
        ("seam", {"proxy": float("nan")}, "proxy"),
        ("seam", {"classes": -2}, "classes"),
        ("seam", {"classes": 0}, "classes"),
        ("seam", {"per_class": "8"}, "per_class"),
        ("seam", {"warmup": -1}, "warmup"),
        ("seam", {"margin": "wide"}, "margin"),
        ("seam", {"discriminability": -1.0}, "discriminability"),
    ],
)
def test_option_values_that_mean_nothing_are_refused(name, options, match, net, train):
    with pytest.raises(InvalidArgument, match=match):
        HubMPQ.from_module(net, X).train_scores(train, strategy=name, strategy_options=options, steps=1)


@pytest.mark.parametrize("sizes", [(2, 2), (4, 1)])
def test_halves_of_one_sample_train_a_batch_norm(sizes):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(n, 6, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3) for n in sizes]
    mpq = HubMPQ.from_module(net.eval(), torch.zeros(1, 6))
    mpq.train_scores(batches, strategy="ebs", steps=2)
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in mpq.scores.pairs.values())


@pytest.mark.parametrize(("name", "options"), [("ebs", {}), ("ebs", {"update": "single"}), ("seam", {"proxy": 1.0})])
def test_strengths_of_a_certain_network_prefer_wide_widths(name, options, net, data):
    """Smoothed labels would reward the widths that make it less certain."""
    with torch.no_grad():
        net[-1].weight.mul_(10)
        net[-1].bias.zero_()
    x = data.tensors[0]
    with torch.no_grad():
        y = net(x).argmax(1)
    train = DataLoader(TensorDataset(x, y), batch_size=32)
    mpq = HubMPQ.from_module(net, X)
    mpq.train_scores(train, strategy=name, strategy_options=options, candidates=[2, 6], steps=12)
    rows = [[min(s for b, s in row.items() if b.weight == w) for w in (2, 6)] for row in mpq.scores.pairs.values()]
    assert sum(narrow - wide for narrow, wide in rows) > 0.1


def test_scores_are_pooled_until_they_never_rise():
    assert falling([3, 1, 2, 0]) == [3, 1.5, 1.5, 0]
    assert falling([0, 0, 3]) == [1, 1, 1]
    assert falling([4, 3, 2]) == [4, 3, 2]
