"""Copies of models that hold more than Parameters and buffers."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from hub_mpq import HubMPQ
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
def test_a_packed_file_is_loaded_into_a_copy(change, tmp_path):
    model = copied(net(change))
    mpq = HubMPQ.from_module(model, X[:1]).apply_policy("W4A8", [X])
    mpq.save_pretrained(tmp_path)
    loaded = HubMPQ.from_pretrained(tmp_path, module=net(change))
    assert torch.equal(loaded.model(X), mpq.model(X))


def test_a_copy_may_share_the_memory_of_parameters():
    """They are Parameters of its own: tied ones stay one, and flags, gradients and devices are each model's own."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    twin = copied(model, model.parameters())
    assert twin[1].weight is twin[0].weight
    assert twin[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert twin[2].running_mean.data_ptr() != model[2].running_mean.data_ptr()
    twin.requires_grad_(False).double()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
