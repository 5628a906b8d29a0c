"""An integer layer with what is fused into it: an activation, a residual sum, the grid of its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .integer_layer import Grid, IntegerLayer


@dataclass(frozen=True)
class Activation:
    """The activation that an integer layer applies to its output.

    Args:
        name: "relu", "clip", "gelu", "hardswish" or "silu".
        low: Lower bound of "clip".
        high: Upper bound of "clip".
        approximate: Approximation of "gelu", as in torch.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    approximate: str = "none"

    def __call__(self, x: Tensor) -> Tensor:
        if self.name == "clip":
            return x.clamp(self.low, self.high)
        if self.name == "gelu":
            return F.gelu(x, approximate=self.approximate)
        return {"relu": F.relu, "hardswish": F.hardswish, "silu": F.silu}[self.name](x)


@dataclass(eq=False)
class FusedLayer:
    """An integer layer with what is fused into it.

    Args:
        layer: The layer, with a following BatchNorm folded in.
        norm: Name of the BatchNorm that is folded in, or "".
        activation: Applied after the residual sum, or None.
        adds: Whether a residual, a second input, is added.
        overwrites: Whether the residual may be overwritten, because it is not read again.
        output: The grid of the output's codes, which all readers share; None: the output is float32.
        shape: Shape of the input in the example.
    """

    layer: IntegerLayer
    norm: str = ""
    activation: Activation | None = None
    adds: bool = False
    overwrites: bool = False
    output: Grid | None = None
    shape: tuple[int, ...] = ()


@torch.no_grad()
def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(factor, summand) per channel of a BatchNorm in evaluation mode."""
    rstd = (norm.running_var.double() + norm.eps).rsqrt()
    factor = rstd if norm.weight is None else norm.weight.double() * rstd
    shift = -norm.running_mean.double() * factor
    return factor.float(), (shift if norm.bias is None else norm.bias.double() + shift).float()
