"""What of a batch is an input, and what is a label."""

from __future__ import annotations

from collections import UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from hub_mpq.errors import InvalidArgument
from hub_mpq.tasks import Classification, Embedding, to_device
from hub_mpq.tasks.batch import Pair, Signature, labels_from, size_of, tree_leaves_of

X, Z, Y = torch.zeros(4, 3), torch.ones(4, 2), torch.arange(4)


class One(nn.Module):
    def forward(self, x):
        return x


class Two(nn.Module):
    def forward(self, x, z):
        return x


class Optional(nn.Module):
    def forward(self, x, mask=None):
        return x


class Many(nn.Module):
    def forward(self, *xs):
        return xs[0]


class Routing(nn.Module):
    def forward(self, x, **more):
        return x


def same(found, wanted):
    """Equal trees of tensors."""
    if isinstance(wanted, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return isinstance(found, dict) and set(found) == set(wanted) and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, (tuple, list)):
        return len(found) == len(wanted) and all(same(a, b) for a, b in zip(found, wanted, strict=True))
    return found == wanted


@pytest.mark.parametrize(
    ("net", "example", "batch", "args", "kwargs", "labels"),
    [
        (One(), X, X, (X,), {}, None),
        (One(), X, (X,), (X,), {}, None),
        (One(), X, (X, Y), (X,), {}, Y),
        (One(), X, [X, Y], (X,), {}, Y),
        (One(), X, {"x": X, "labels": Y}, (), {"x": X}, Y),
        (One(), X, {"x": X, "label": Y}, (), {"x": X}, Y),
        (One(), X, {"x": X, "target": Y}, (), {"x": X}, Y),
        (One(), X, UserDict({"x": X, "labels": Y}), (), {"x": X}, Y),
        (One(), X, ({"x": X}, Y), (), {"x": X}, Y),
        (One(), X, (X, (Y, Z)), (X,), {}, [Y, Z]),
        (One(), X, (X, {"a": Y, "b": Z}), (X,), {}, {"a": Y, "b": Z}),
        (One(), X, (X.numpy(), Y.numpy()), (X,), {}, Y),
        (One(), X, (X, [0, 1, 2, 3]), (X,), {}, Y),
        (One(), X, (X, [[0.0, 1.0], [2.0, 3.0]]), (X,), {}, torch.tensor([[0.0, 1], [2, 3]])),
        (Two(), (X, Z), (X, Z), (X, Z), {}, None),
        (Two(), None, (X, Z), (X, Z), {}, None),
        (Two(), (X, Z), (X, Z, Y), (X, Z), {}, Y),
        (Two(), (X, Z), ((X, Z), Y), (X, Z), {}, Y),
        (Two(), (X, Z), ((X, Z),), (X, Z), {}, None),
        (Two(), (X, Z), {"x": X, "z": Z, "labels": Y}, (), {"x": X, "z": Z}, Y),
        (Two(), {"x": X, "z": Z}, ({"x": X, "z": Z}, Y), (), {"x": X, "z": Z}, Y),
        (Optional(), X, (X, Y), (X,), {}, Y),
        (Optional(), (X, Z), ((X, Z), Y), (X, Z), {}, Y),
        (Optional(), (X, Z), (X, Z, Y), (X, Z), {}, Y),
        (One(), X, (X, [np.int64(i) for i in range(4)]), (X,), {}, Y),
        (One(), X, (X, [torch.tensor(i) for i in range(4)]), (X,), {}, Y),
        (One(), X, (X, np.arange(4, dtype=np.uint16)), (X,), {}, Y),
        (One(), ({"x": X},), {"x": X}, ({"x": X},), {}, None),
        (One(), ({"x": X},), ({"x": X}, Y), ({"x": X},), {}, Y),
        (Many(), (X, Z), ((X, Z),), (X, Z), {}, None),
        (Many(), (X, Z), (X, Z, Y), (X, Z), {}, Y),
        (Routing(), X, {"x": X, "z": Z, "labels": Y}, (), {"x": X, "z": Z}, Y),
        (torch.jit.trace(nn.Linear(3, 2), X), X, (X, Y), (X,), {}, Y),
    ],
)
def test_parts_of_a_batch(net, example, batch, args, kwargs, labels):
    task = Classification().bind(net, example)
    assert same(task.parts(batch), (args, kwargs, labels))
    assert same(task.inputs(batch), (args, kwargs))
    assert same(task.labels(batch), labels)


@pytest.mark.parametrize(
    ("net", "example", "batch", "said"),
    [
        (One(), X, (X, Y, ["a", "b"]), "the batch has 3 parts, but One takes 1 input"),
        (One(), X, (X, Y, Y), "the batch has 3 parts"),
        (Two(), (X, Z), (X, Z, Y, Y), "the batch has 4 parts, but Two takes 2 inputs"),
        (Two(), (X, Z), ((X, Z, Z), Y), "3 inputs, but Two takes 2"),
        (Optional(), (X, Z), (X, Z), "two inputs, or an input and its labels"),
        (One(), X, (X, ["cat", "dog"]), "labels must be numbers, got 'cat'"),
        (One(), X, (X, object()), "labels must be tensors, arrays or lists of numbers, got object"),
        (One(), X, {"x": X, "labels": Y, "idx": Y}, "unexpected 'idx' in the batch: One takes"),
        (One(), X, {"image": X}, "unexpected 'image' in the batch: One takes"),
        (One(), X, ({"x": X, "labels": Y}, Y), "got labels twice, inside the dict of inputs and next to it"),
        (One(), X, (), "empty"),
        (One(), X, "text", "a batch of type str contains no tensor"),
        (One(), X, object(), "a batch of type object contains no tensor"),
    ],
)
def test_a_part_without_a_place_is_refused(net, example, batch, said):
    with pytest.raises(InvalidArgument, match=said):
        Classification().bind(net, example).parts(batch)


def test_labels_under_keys_of_ones_own():
    task = Classification(label_keys="species").bind(One(), X)
    assert same(task.labels({"x": X, "species": Y}), Y)
    with pytest.raises(InvalidArgument, match="species"):
        Classification().bind(One(), X).labels({"x": X, "species": Y})


def test_a_call_that_the_network_does_not_take_is_one_sentence():
    task = Embedding().bind(nn.Sequential(nn.Linear(3, 2)), X)
    with pytest.raises(InvalidArgument, match="Sequential cannot be called on this batch"):
        task.forward(nn.Sequential(nn.Linear(3, 2)), ((X, {"id": Y}), Y))


def test_a_compiled_network_is_called_like_the_one_inside():
    compiled = torch.compile(Two(), backend="eager")
    assert Signature.of(compiled).positional == 2


class Named(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


def test_batches_keep_their_form_on_the_way_to_a_device():
    device = torch.device("meta")
    moved = to_device(Named(X, Y), device)
    assert isinstance(moved, Named)
    assert moved.image.is_meta
    pair = to_device(Pair((X, Y), {"x": X.numpy()}), device)
    assert isinstance(pair, Pair)
    assert pair.held["x"].is_meta
    assert to_device(["a", X], device)[0] == "a"
    # labels that become tensors later go where the inputs are
    for labels in ([0, 1, 2, 3], [{"class_labels": [1]}]):
        found = Classification().bind(One(), X).labels(to_device((X, labels), device))
        assert tree_leaves_of(found, torch.Tensor)[0].is_meta


def test_a_pair_counts_the_samples_of_both_halves():
    assert size_of(Pair((X, Y), (X[:2], Y[:2]))) == 6
    assert size_of({"scale": torch.tensor(1.0), "x": np.zeros((5, 2))}) == 5
    # inputs that are nested like a pair are none
    assert size_of(((X, Z), (Y, Y))) == 4
    assert same(Classification().bind(Two(), (X, Z)).parts(Pair((X, Z, Y), (X, Z, Y))), ((X, Z), {}, Y))


def test_lists_of_dicts_stay_lists():
    found = labels_from([{"class_labels": np.array([1]), "boxes": [[0.1, 0.2, 0.3, 0.4]]}])
    assert same(found, [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.1, 0.2, 0.3, 0.4]])}])
