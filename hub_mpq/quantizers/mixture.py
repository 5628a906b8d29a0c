"""EBS: a tensor at all bit-widths at once, mixed with learned weights (Li et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .lsq import LSQ


class Mixture(nn.Module):
    """Σ_i softmax(r)_i · Q_{b_i}(x), as in the paper, with LSQ quantizers (our construction).

    r = strengths + prices, both [len(widths)] and initialised to zero, which weights all bit-widths equally. Two
    parameters separate the effects of the task and of the budget; under SGD they move as one (our construction).
    `noise` and `temperature` are those of the Gumbel softmax; without noise it is the deterministic form.
    """

    def __init__(self, widths: Sequence[int], *, signed: bool) -> None:
        super().__init__()
        self.lsq = LSQ(widths, signed=signed)
        self.strengths = nn.Parameter(torch.zeros(len(self.lsq.widths)))
        self.prices = nn.Parameter(torch.zeros(len(self.lsq.widths)))
        self.noise: Tensor | None = None
        self.temperature = 1.0

    @property
    def widths(self) -> tuple[int, ...]:
        return self.lsq.widths

    def draw(self, generator: torch.Generator) -> None:
        """Draw new Gumbel noise from a generator on the CPU."""
        uniform = torch.rand(len(self.widths), generator=generator).clamp_(1e-9, 1 - 1e-7)
        self.noise = (-(-uniform.log()).log()).to(self.strengths)

    def weights(self) -> Tensor:
        """The weights of the bit-widths in the forward pass, [len(widths)], with a sum of 1."""
        if self.noise is None:
            return self.probabilities()
        return torch.softmax((self.strengths + self.prices + self.noise) / self.temperature, 0)

    def probabilities(self) -> Tensor:
        """softmax(r), [len(widths)]."""
        return torch.softmax(self.strengths + self.prices, 0)

    def expected_width(self) -> Tensor:
        """Σ_i softmax(r)_i · b_i, in bits."""
        return self.probabilities() @ self.strengths.new_tensor([float(b) for b in self.widths])

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for weight, bits in zip(self.weights(), self.widths, strict=True):
            self.lsq.set_width(bits)
            out = out + weight * self.lsq(x)
        return out
