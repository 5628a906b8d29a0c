"""Lists whose length is the number of experts, but whose members are not all routed to or are not alike."""

import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.nn.routed_experts import routed_experts


class Mixture(nn.Module):
    """Experts that all run on every token, or of which one runs."""

    def __init__(self, experts, runs=None):
        super().__init__()
        self.stem, self.head, self.experts = nn.Linear(8, 8), nn.Linear(8, 4), nn.ModuleList(experts)
        self.num_experts, self.runs = len(experts), range(len(experts)) if runs is None else runs

    def forward(self, x):
        x = self.stem(x)
        return self.head(sum(self.experts[i](x) for i in self.runs))


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def test_experts_that_are_not_alike_are_counted_as_they_ran(tmp_path):
    torch.manual_seed(0)
    wide, narrow = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), nn.Sequential(nn.Linear(8, 8))
    net = Mixture([wide, narrow]).eval()
    assert routed_experts(net) == []
    mpq = HubMPQ.from_module(net, X)
    macs = {name: mpq.graph[f"experts.{name}"].macs for name in ("0.0", "0.2", "1.0")}
    assert macs == {"0.0": 5 * 8 * 32, "0.2": 5 * 8 * 32, "1.0": 5 * 8 * 8}
    mpq.apply_policy("W4A8", [X])
    mpq.save_pretrained(tmp_path)


def test_experts_of_other_sizes_are_counted_as_they_ran():
    net = Mixture([nn.Sequential(nn.Linear(8, n), nn.Linear(n, 8)) for n in (8, 64)]).eval()
    graph = HubMPQ.from_module(net, X).graph
    assert [graph[f"experts.{i}.0"].macs for i in range(2)] == [5 * 8 * 8, 5 * 8 * 64]


def test_experts_that_all_run_read_one_tensor():
    graph = HubMPQ.from_module(Mixture([nn.Linear(8, 8) for _ in range(3)]).eval(), X).graph
    assert [graph[f"experts.{i}"].macs for i in range(3)] == [5 * 8 * 8] * 3
    assert {graph[f"experts.{i}"].buffer for i in range(3)} == {"experts.0"}


def test_experts_that_are_alike_share_what_one_of_them_ran():
    graph = HubMPQ.from_module(Mixture([nn.Linear(8, 8) for _ in range(4)], runs=[2]).eval(), X).graph
    assert [graph[f"experts.{i}"].macs for i in range(4)] == [5 * 8 * 8 // 4] * 4
