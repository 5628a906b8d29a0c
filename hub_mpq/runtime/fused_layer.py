"""An integer layer with what it takes along: an activation, a residual sum, the grid of its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .integer_layer import Grid, IntegerLayer


@dataclass(frozen=True)
class Activation:
    """What an integer layer applies to its output.

    Args:
        name: "relu", "clip", "gelu", "hardswish" or "silu".
        low, high: Of "clip".
        approximate: Of "gelu", as in torch.
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
    """One integer layer with what it takes along.

    Args:
        layer: The layer, a BatchNorm behind it folded in.
        norm: Name of the BatchNorm that is folded in, or "".
        activation: Applied after the sum, or None.
        adds: Whether a second input is added.
        overwrites: Whether nobody else reads that second input any more.
        output: The grid that every reader of the output has; None: float32.
        shape: Of the input, of the example.
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
    """(factor, summand) of each channel of an evaluated BatchNorm."""
    rstd = (norm.running_var.double() + norm.eps).rsqrt()
    factor = rstd if norm.weight is None else norm.weight.double() * rstd
    shift = -norm.running_mean.double() * factor
    return factor.float(), (shift if norm.bias is None else norm.bias.double() + shift).float()
