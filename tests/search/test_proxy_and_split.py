"""Splits that never mix, balanced batches, and SEAM's loss."""

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.search.proxy import class_loader
from hub_mpq.search.seam import margin_loss
from hub_mpq.search.train_val_split import train_val_split
from hub_mpq.tasks.batch import size_of

X = torch.zeros(1, 1, 8, 8)


def loader(n=100, batch=10, **more):
    data = TensorDataset(torch.arange(n), torch.arange(n) % 5)
    return DataLoader(data, batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(0), **more)


def test_training_and_held_out_samples_never_mix():
    split = train_val_split(loader(), seed=3)
    assert len(split) == 10
    seen = [set(), set()]
    for _ in range(3):
        for batch in split:
            assert size_of(batch) == 10
            for half, found in zip(batch, seen, strict=True):
                found.update(half[0].tolist())
    assert not seen[0] & seen[1]
    assert len(seen[0]) == len(seen[1]) == 50


def test_lists_of_batches_are_cut_in_two():
    batches = [{"x": torch.arange(8), "labels": torch.arange(8)}, (torch.arange(5), torch.arange(5))]
    first, second = list(train_val_split(batches, 0))
    assert first[0]["x"].tolist() == [0, 1, 2, 3]
    assert first[1]["labels"].tolist() == [4, 5, 6, 7]
    assert second[1][0].tolist() == [2, 3, 4]
    with pytest.raises(InvalidArgument, match="at least 2"):
        list(train_val_split([torch.zeros(1, 3)], 0))


def test_a_last_batch_of_one_is_trained_on_and_never_held_out():
    ((_, held), (one, again)) = train_val_split([(torch.arange(4), torch.arange(4)), (torch.ones(1), torch.ones(1))], 0)
    assert one[0].tolist() == [1]
    assert again is held
    assert again[0].tolist() == [2, 3]


def test_a_share_of_every_class_in_batches_of_classes_times_samples():
    found = class_loader(loader(500, 20), 0.1, None, 5, seed=1)
    seen = set()
    for _ in range(4):
        for x, y in found:
            assert len(y) == 20
            assert sorted(y.bincount(minlength=5).tolist()) == [0, 5, 5, 5, 5]
            seen.update(x.tolist())
    assert len(seen) == 50  # ten of each class, no more
    assert [x.tolist() for x, _ in found] == [
        x.tolist() for x, _ in class_loader(loader(500, 20), 0.1, None, 5, seed=1)
    ]
    with pytest.raises(InvalidArgument, match="length"):
        class_loader([torch.zeros(2)], 0.1, None, 5, 0)


def test_margin_loss_at_known_points_and_its_gradient():
    labels = torch.tensor([0, 0, 1, 1])
    tight = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3]])
    assert float(margin_loss(tight, labels, 0.2)) == pytest.approx(0, abs=1e-6)
    one = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0]])
    assert float(margin_loss(one, labels, 0.2)) == pytest.approx(0.8)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_(True)
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    (grad,) = torch.autograd.grad(margin_loss(x, y, -0.9), [x])
    for i, j in ((0, 0), (3, 2), (5, 1)):
        with torch.no_grad():
            up, down = x.clone(), x.clone()
            up[i, j] += 1e-2
            down[i, j] -= 1e-2
        slope = (margin_loss(up, y, -0.9) - margin_loss(down, y, -0.9)) / 2e-2
        # the loss is in float32
        assert float(grad[i, j]) == pytest.approx(float(slope), rel=2e-2, abs=1e-4)


def test_a_proxy_of_other_classes_gets_a_fresh_head_on_the_copy_only(net, train):
    other = DataLoader(TensorDataset(torch.randn(48, 1, 8, 8), torch.arange(48) % 9), batch_size=16)
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8))
    found = mpq.train_scores(train, strategy="seam", strategy_options={"proxy": other, "warmup": 3}, steps=2)
    assert found.provenance["fresh_head"] is True
    assert net[-1].out_features == 5
    mpq.apply_policy(mpq.search(bitops="W3A3").policy, train).finetune(train, steps=1)
    unlabelled = [torch.zeros(4, 1, 8, 8)]
    with pytest.raises(InvalidArgument, match="class label"):
        mpq.train_scores(train, strategy="seam", strategy_options={"proxy": unlabelled}, steps=1)


class Recorded(Dataset):
    """`data` that knows which samples were read. It shows no labels but in its samples."""

    def __init__(self, data):
        self.data, self.read = data, set()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.read.add(int(i))
        return self.data[i]


@pytest.mark.parametrize("kind", ["batches", "loader", "data-free"])
def test_batches_of_bare_tensors_are_distilled(kind, net, data):
    mpq = HubMPQ.from_module(net, X)
    x = data.tensors[0]
    if kind == "data-free":
        with pytest.warns(UserWarning, match="synthetic"):
            mpq.quantize(strategy="ebs", bitops="W3A3", indicator_options={"steps": 2})
    else:
        batches = [x[:16], x[16:32]] if kind == "batches" else DataLoader(list(x), batch_size=16, shuffle=True)
        mpq.train_scores(batches, strategy="ebs", steps=2)
    assert mpq.scores.provenance["distill"] == 1
    # as many samples as were read, both halves
    assert mpq.scores.provenance["samples"] == {"data-free": 16}.get(kind, 32)


SAMPLERS = {
    "subset": SubsetRandomSampler(range(48)),
    "list": list(range(48)),
    "sequential": SequentialSampler(range(48)),
    "random": RandomSampler(range(48)),
    "weighted": WeightedRandomSampler([1.0] * 48 + [0.0] * 48, 96),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("name", "options"), [("ebs", {}), ("seam", {"proxy": 1.0})])
def test_samples_that_the_sampler_leaves_out_are_not_read(name, options, sampler, net, data):
    mpq, found = HubMPQ.from_module(net, X), Recorded(data)
    train = DataLoader(found, batch_size=16, sampler=SAMPLERS[sampler])
    mpq.train_scores(train, strategy=name, strategy_options=options, epochs=2)
    assert max(found.read) < 48
    assert len(found.read) > 24  # nearly all of those it draws


def test_a_sampler_of_batches_and_one_without_length(net, data):
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield from range(48)

    mpq, found = HubMPQ.from_module(net, X), Recorded(data)
    batches = BatchSampler(SubsetRandomSampler(range(48)), 16, drop_last=False)
    for options in ({"strategy": "ebs"}, {"strategy": "seam", "strategy_options": {"proxy": 1.0}}):
        mpq.train_scores(DataLoader(found, batch_sampler=batches), epochs=2, **options)
    endless = DataLoader(found, batch_size=16, sampler=Endless())
    mpq.train_scores(endless, strategy="ebs", steps=4)
    with pytest.raises(InvalidArgument, match="sampler"):
        mpq.train_scores(endless, strategy="seam", steps=4)
    assert max(found.read) < 48


def test_the_split_of_a_sampler_never_mixes():
    data = TensorDataset(torch.arange(100))
    split = train_val_split(DataLoader(data, batch_size=10, sampler=SubsetRandomSampler(range(20, 60))), seed=3)
    seen = [set(), set()]
    for _ in range(3):
        for batch in split:
            for half, found in zip(batch, seen, strict=True):
                found.update(half[0].tolist())
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(20, 60))


def test_a_last_half_of_one_sample_is_left_out():
    sizes = [size_of(batch) for batch in train_val_split(loader(34, 16), seed=0)]
    assert sizes == [16, 16]
    assert [size_of(batch) for batch in train_val_split(loader(36, 16), seed=0)] == [16, 16, 4]
    mpq = HubMPQ.from_module(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.BatchNorm1d(4)), torch.zeros(2, 4))
    data = TensorDataset(torch.randn(34, 4), torch.arange(34) % 4)
    mpq.train_scores(DataLoader(data, batch_size=16), strategy="ebs", epochs=1)


@pytest.mark.parametrize("label", ["cat", torch.tensor([0, 1]), 1.5, None])
def test_labels_that_are_no_class_are_refused(label):
    for data in ([(torch.zeros(2), label)] * 8, [{"x": torch.zeros(2), "labels": label}] * 8):
        with pytest.raises(InvalidArgument, match=r"label"):
            class_loader(DataLoader(data, batch_size=4), 0.5, None, 4, 0)
    with pytest.raises(InvalidArgument, match="needs labelled data"):
        class_loader(DataLoader(torch.zeros(8, 3, 4, 4), batch_size=4), 0.5, None, 4, 0)


class _NeedsWorkers(TensorDataset):
    """Reads samples only where the loader's `worker_init_fn` opened it."""

    opened = False

    def __getitem__(self, index):
        assert self.opened
        return super().__getitem__(index)


def _open(worker):
    torch.utils.data.get_worker_info().dataset.opened = True


def test_workers_of_a_reordered_loader_start_as_the_users_do():
    from hub_mpq.search.held_out import spread

    data = _NeedsWorkers(torch.arange(12.0))
    loader = DataLoader(data, batch_size=4, num_workers=1, worker_init_fn=_open)
    seen = torch.cat([x for (x,) in spread(loader, 0)])
    assert sorted(seen.tolist()) == list(range(12))
    assert seen.tolist() != list(range(12))
    assert train_val_split(loader, 0).worker_init_fn is _open
    labelled = DataLoader(TensorDataset(torch.zeros(12), torch.arange(12) % 2), batch_size=4, worker_init_fn=_open)
    assert class_loader(labelled, 0.5, None, 2, 0).worker_init_fn is _open
