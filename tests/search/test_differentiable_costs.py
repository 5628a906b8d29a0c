"""A limit's differentiable form is the limit itself where widths are whole numbers."""

import pytest
import torch

from hub_mpq import HubMPQ, LayerBits
from hub_mpq.core import limits
from hub_mpq.search.differentiable_costs import evaluate

REDUCED = [limit for limit in limits if limit.name != "latency"]


def test_times_of_a_table_are_left_to_the_solver(net):
    graph = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).graph
    assert limits.get("latency").reduction(graph) is None


@pytest.mark.parametrize("limit", REDUCED, ids=lambda limit: limit.name)
@pytest.mark.parametrize("level", ["W2A3", "W5A8", "W8A2"])
def test_it_is_the_limit_at_whole_widths(net, limit, level):
    graph = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).graph
    bits = LayerBits.parse(level)
    widths = {
        x.name: (torch.tensor(float(bits.weight), requires_grad=True), torch.tensor(float(bits.activation)))
        for x in graph.searched
    }
    found = evaluate(limit.reduction(graph), widths)
    exact = limit.combine([limit.of_layer(x, bits) for x in graph.searched])
    # bytes are rounded up to words of 4, scales and all
    assert float(found) == pytest.approx(exact, abs=4 * len(graph) if limit.unit == "B" else 1e-3)
    largest = max(limit.of_layer(x, bits) for x in graph.searched)
    assert (float(found) > 1.5 * largest) is (limit.over == "sum")
