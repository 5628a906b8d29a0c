"""Quantized layers where a float layer works too: no batch axis, sparse gradients, inference mode."""

from __future__ import annotations

import torch
from torch import nn

from hub_mpq import HubMPQ

G = torch.Generator().manual_seed(0)


def quantized(net: nn.Module, x: torch.Tensor) -> nn.Module:
    mpq = HubMPQ.from_module(net, x, fixed={"*": "W4A4"})
    mpq.apply_policy("W4A4", [x])
    return mpq.model


def test_an_image_without_a_batch_axis_has_the_gradients_of_a_batch_of_one():
    net = quantized(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)), torch.rand(2, 2, 8, 8, generator=G)
    )
    image = torch.rand(2, 8, 8, generator=G)
    found = []
    for x in (image, image[None]):
        net.zero_grad()
        net(x).sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for one, batch in zip(*found, strict=True):
        # a scale's gradient is divided by the root of the features of one sample: an image's first axis is no batch
        if one.dim() > 2 or one.dim() == 1:
            torch.testing.assert_close(one, batch)


def test_an_embedding_with_sparse_gradients_trains():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2)

        def forward(self, ids):
            return self.head(self.words(ids).mean(1))

    ids = torch.tensor([[0, 1, 1], [2, 3, 5]])
    net = quantized(Words(), ids)
    net(ids).sum().backward()
    grad = net.words.weight.grad.to_dense()
    assert grad[4].abs().sum() == 0 < grad[1].abs().sum()


def test_a_model_made_in_inference_mode_runs():
    x = torch.randn(4, 3, generator=G)
    with torch.inference_mode():
        net = quantized(nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)), x)
        assert net(x).shape == (4, 2)
