"""Copies of models that hold more than Parameters and buffers."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from hub_mpq import HubMPQ, IndicatorOptions
from hub_mpq.adapters.restore_state import copied

X = torch.linspace(-1, 1, 32).view(4, 8)


class Keeps(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


def net(change):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    change(made)
    made(X).sum().backward()
    return made.eval()


CHANGES = {
    "weight_norm": lambda n: weight_norm(n[2]),
    "spectral_norm": lambda n: spectral_norm(n[2]),
    "prune": lambda n: prune.l1_unstructured(n[2], "weight", 0.5),
    "prune a bias": lambda n: prune.l1_unstructured(n[2], "bias", 0.5),
    "a stored output": lambda n: n.__setitem__(2, Keeps(8, 8)),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_with_computed_tensors_is_copied(change):
    model = net(change)
    twin = copied(model)
    before = model(X)
    assert torch.equal(twin(X), before)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(twin(X), before)
    assert not torch.equal(model(X), before)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_scores_are_trained_on_a_copy(change):
    model = net(change)
    before = model(X)
    mpq = HubMPQ.from_module(model, X[:1])
    found = mpq.train_indicators([(X, torch.zeros(4, dtype=torch.long))], IndicatorOptions(steps=1))
    assert found is not None
    assert torch.equal(model(X), before)
