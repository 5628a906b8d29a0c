"""Splits that never mix, balanced batches, and SEAM's loss."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.search.ebs import falling
from hub_mpq.search.pairs import pairs
from hub_mpq.search.proxy import class_loader
from hub_mpq.search.seam import margin_loss
from hub_mpq.train.batch import size_of


def loader(n=100, batch=10, **more):
    data = TensorDataset(torch.arange(n), torch.arange(n) % 5)
    return DataLoader(data, batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(0), **more)


def test_training_and_held_out_samples_never_mix():
    split = pairs(loader(), seed=3)
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
    first, second = list(pairs(batches, 0))
    assert first[0]["x"].tolist() == [0, 1, 2, 3]
    assert first[1]["labels"].tolist() == [4, 5, 6, 7]
    assert second[1][0].tolist() == [2, 3, 4]
    with pytest.raises(InvalidArgument, match="at least 2"):
        list(pairs([torch.zeros(1, 3)], 0))


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


def test_scores_are_pooled_until_they_never_rise():
    assert falling([3, 1, 2, 0]) == [3, 1.5, 1.5, 0]
    assert falling([0, 0, 3]) == [1, 1, 1]
    assert falling([4, 3, 2]) == [4, 3, 2]
