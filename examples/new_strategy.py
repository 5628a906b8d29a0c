"""A custom search strategy in one file: registered by name, and solved like the built-in ones.

    python examples/new_strategy.py
    hub-mpq quantize MODEL --strategy examples/new_strategy.py:fan-out --data … --bitops W4A4 -o out

It scores a layer by the number of outputs that use each of its weights, so that weights which are used often keep more
bits.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hub_mpq import HubMPQ, SearchStrategy, register_strategy
from hub_mpq.search.strategy import additive


@register_strategy("fan-out")
class FanOut(SearchStrategy):
    """Score layers by the fan-out of their weights.

    The keyword arguments of the constructor are the options of the strategy. This one does not train; a strategy that
    trains keeps `trains = True` and implements `losses`.

    Args:
        power: Exponent of the fan-out.
    """

    trains = False

    def __init__(self, *, power: float = 0.5) -> None:
        self.power = power

    def attach(self, model, graph, candidates, norms):
        self.graph, self.candidates = graph, candidates

    def scores(self, model):
        reads = {x.name: (x.macs / x.weight_count) ** self.power for x in self.graph.searched}
        weight = {n: {b: r * 4.0**-b for b in self.candidates[n].weight} for n, r in reads.items()}
        inputs = {n: {b: r * 4.0**-b for b in self.candidates[n].activation} for n, r in reads.items()}
        return additive(self.graph, weight, inputs)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 8, 8, generator=generator)
    data = DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=16)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )
    mpq = HubMPQ.from_module(net, x[:1])
    mpq.quantize(strategy="fan-out", strategy_options={"power": 1.0}, bitops="W3A3", train=data, steps=4)
    assert mpq.usage()["bitops"] <= mpq.usage("W3A3")["bitops"]
    print(mpq.report())


if __name__ == "__main__":
    main()
