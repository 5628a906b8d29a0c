"""Which task labels and outputs mean, and what is refused because it may mean several."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ, Task
from hub_mpq.errors import InvalidArgument
from hub_mpq.tasks import Classification, Heads, task_of
from hub_mpq.tasks.detect import by_labels


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def whole(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("output", "labels", "name"),
    [
        (draw(8, 5), whole(5, 8), "classification"),
        (draw(8, 5), whole(5, 8, 1), "classification"),
        (draw(8, 2), torch.tensor([0, 1] * 4), "classification"),
        (draw(8, 5), torch.tensor([0, -100] * 4), "classification"),
        (draw(8, 5), draw(8, 5).softmax(-1), "classification"),  # as mixup makes them
        (draw(8, 5), torch.tensor([[0.0, 1, 1, 0, 0]] * 8), "multi-label"),
        (draw(8, 5), torch.tensor([[0, 1, 1, 0, 0]] * 8), "multi-label"),
        (draw(8, 5), torch.tensor([[False, True, True, False, False]] * 8), "multi-label"),
        (draw(8), draw(8), "regression"),
        (draw(8, 1), draw(8), "regression"),
        (draw(8), draw(8, 1), "regression"),
        (draw(8, 1), draw(8, 1), "regression"),
        (draw(8, 5), draw(8, 5), "regression"),
        (draw(8, 1), torch.tensor([1, 2, 3, 4, 5, 1, 2, 3]), "regression"),  # ratings: no class, no yes or no
        (draw(8, 5), whole(9, 8, 5), "regression"),
        (draw(8, 1, 6, 7), draw(8, 1, 6, 7).sigmoid(), "regression"),
        (draw(8, 1, 6, 7), draw(8, 6, 7), "regression"),
        (draw(8, 5, 6, 7), whole(5, 8, 6, 7), "segmentation"),
        (draw(8, 5, 6, 7), whole(5, 8, 1, 6, 7), "segmentation"),
        (draw(8, 7, 7, 7), whole(7, 8, 7, 7), "segmentation"),
        (draw(8, 5, 3, 6, 7), whole(5, 8, 3, 6, 7), "segmentation"),
        (draw(8, 6, 5), whole(5, 8, 6), "token-classification"),
        (draw(8, 5, 6), whole(5, 8, 6), "segmentation"),  # torch's order of a map of one axis
    ],
)
def test_labels_that_mean_one_task(output, labels, name):
    assert by_labels(output, labels).name == name


@pytest.mark.parametrize(
    ("output", "labels", "said"),
    [
        (draw(8, 1), torch.tensor([0, 1] * 4), "'multi-label' or task='regression'"),
        (draw(8), torch.tensor([0.0, 1] * 4), "'multi-label' or task='regression'"),
        (draw(8, 1), torch.zeros(8), "'multi-label' or task='regression'"),
        (draw(8, 3), torch.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]], "'classification' or task='multi-label'"),
        (draw(8, 3), torch.eye(3).long()[[0, 1, 2, 0, 1, 2, 0, 1]], "'classification' or task='multi-label'"),
        (draw(8, 1, 6, 7), whole(2, 8, 1, 6, 7), "'multi-label' or task='regression'"),
        (draw(8, 6, 6), whole(5, 8, 6), "'segmentation' or task='token-classification'"),
        (draw(8, 5), torch.tensor([[0.05, 0.95, 0.95, 0.05, 0.05]] * 8), "'multi-label' or task='regression'"),
        (draw(8, 5).softmax(1), whole(5, 8), "looks like probabilities"),
        (draw(8, 5).sigmoid(), torch.tensor([[0.0, 1, 1, 0, 0]] * 8), "looks like probabilities"),
        (draw(8, 5, 6, 7).softmax(1), whole(5, 8, 6, 7), "looks like probabilities"),
        (draw(8, 5), draw(8), "no task can be detected for labels of shape"),
        (draw(8, 5), whole(5, 8, 2), "no task can be detected for labels of shape"),
        (draw(8, 5, 6, 7), whole(5, 8, 3, 3), "no task can be detected for labels of shape"),
        (draw(8, 5), whole(5, 7), "no task can be detected for labels of shape"),
        ((draw(8, 5), draw(8, 9)), whole(5, 8), "contains 0, 1"),
        (draw(8, 5), {"id": torch.arange(8)}, "labels id do not match the outputs output"),
        ((draw(8, 5), draw(8, 2)), [whole(5, 8)], "labels 0 do not match the outputs 0, 1"),
        (draw(8, 5), object(), "no task is known for labels of type object"),
    ],
)
def test_labels_that_may_mean_several_tasks_or_none(output, labels, said):
    with pytest.raises(InvalidArgument, match=said):
        by_labels(output, labels)


def test_labels_that_repeat_the_input_are_of_a_language_model():
    """Without a shift a network that copies its input would be right everywhere."""
    ids = whole(5, 8, 6)
    assert by_labels(draw(8, 6, 5), ids, ids).name == "causal-lm"
    assert by_labels(draw(8, 6, 5), ids.masked_fill(ids == 2, -100), ids).name == "causal-lm"
    assert by_labels(draw(8, 6, 5), (ids + 1) % 5, ids).name == "token-classification"


def test_nested_labels_are_of_nested_outputs():
    found = by_labels({"kind": draw(8, 5), "box": draw(8, 4)}, {"kind": whole(5, 8), "box": draw(8, 4)})
    assert isinstance(found, Heads)
    assert {key: task.name for key, task in found.heads.items()} == {"kind": "classification", "box": "regression"}
    pair = by_labels((draw(8, 5), draw(8, 3)), [whole(5, 8), whole(3, 8)])
    assert set(pair.heads) == {"0", "1"}


def test_a_name_or_an_object_is_taken_as_it_is_and_a_wrong_one_refused():
    net = nn.Linear(3, 1)
    assert task_of("regression", net).name == "regression"
    mine = Task.custom(lambda output, labels: (output - labels).abs().mean(), name="mine")
    assert task_of(mine, net).name == "mine"
    with pytest.raises(InvalidArgument, match=r"unknown task 'regresion'; choose from .*regression"):
        task_of("regresion", net)
    with pytest.raises(InvalidArgument, match="got type"):
        task_of(Classification, net)
    with pytest.raises(InvalidArgument, match="unknown task"):
        HubMPQ.from_module(net, torch.zeros(1, 3), task="regresion")
