"""EBS: one tensor at all widths at once, mixed by learned strengths (Li et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .lsq import LSQ


class Mixture(nn.Module):
    """Σ_i softmax(r)_i · Q_{b_i}(x) [sure]; the quantizers are LSQ's, one learned scale a width [ours].

    r = strengths + prices, shapes [len(widths)], both starting at zero: every width alike. Two parameters, so that what
    the task wants and what the budget pushes can be told apart afterwards; under SGD they move as one [ours].
    `noise`, `temperature`: of the Gumbel softmax; None: the deterministic form.
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
        """New Gumbel noise, from a generator on the CPU."""
        uniform = torch.rand(len(self.widths), generator=generator).clamp_(1e-9, 1 - 1e-7)
        self.noise = (-(-uniform.log()).log()).to(self.strengths)

    def weights(self) -> Tensor:
        """Weights of the widths in the forward pass, [len(widths)], summing to 1."""
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
