"""Initial scales: the formulas of the LIMPQ authors, and the scale of least squared error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import QuantSpec
from .base import channel_rows
from .fake_quantize_kernels import to_int
from .lsq import NO_START

_RATIOS = torch.linspace(0.2, 1.1, 46)


def _unit(top: Tensor) -> Tensor:
    """The power of two below `top`; dividing by it is exact, and keeps squares of tiny values from underflowing."""
    return torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent - 1)


@torch.no_grad()
def weight_scale_sigma(weight: Tensor, bits: int) -> Tensor:
    """Compute LIMPQ's initial weight scale for the whole tensor.

    It is `max(|μ−3σ|, |μ+3σ|) / 2^(b−1)`, from the mean μ and the standard deviation σ of the weights.

    Args:
        weight: The weight, of any shape.
        bits: The bit-width b.

    Returns:
        The scale, shape `[1]`; 2^−100 for a weight of zeros, which `LSQ` treats as not initialized.

    References:
        LIMPQ (Tang et al., ECCV 2022).

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import weight_scale_sigma
        >>> weight_scale_sigma(torch.tensor([[-1.0, 1.0]]), 3)
        tensor([0.7500])
    """
    w = weight.detach().float()
    unit = _unit(w.abs().max())
    mean, sigma = (w / unit).mean(), (w / unit).std(unbiased=False)
    scale = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 2 ** (bits - 1) * unit
    return torch.where(scale > 0, scale, NO_START).reshape(1)


@torch.no_grad()
def weight_scale_mse(weight: Tensor, bits: int, *, axis: int | None = 0) -> Tensor:
    """Compute the weight scales of least squared error.

    Args:
        weight: The weight, of any shape.
        bits: The bit-width.
        axis: The channel axis; a negative one counts from the end, and all axes before the last two then count as
            channels too (for a stack of matrices). None for one scale per tensor.

    Returns:
        The scales, `[channels]`, or `[1]` per tensor; 2^−100 for zero weights, which `LSQ` treats as not initialized.

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import weight_scale_mse
        >>> weight_scale_mse(torch.tensor([[-1.0, 1.0], [-0.5, 0.5]]), 1)
        tensor([1.0000, 0.5000])
    """
    rows = weight.detach().float()
    rows = rows.reshape(1, -1) if axis is None else channel_rows(rows, axis)
    spec = QuantSpec(bits)
    largest = rows.abs().amax(1, keepdim=True)
    unit = _unit(largest)
    rows = rows / unit
    if spec.binary:  # closed form: mean |w|
        return torch.where(largest > 0, rows.abs().mean(1, keepdim=True) * unit, NO_START).reshape(-1)
    top = largest / unit / max(spec.qmax, 1)
    best = torch.full_like(top, math.inf)
    scale = top.clone()
    for ratio in _RATIOS.tolist():
        trial = top * ratio
        error = to_int(rows, trial, spec.qmin, spec.qmax).mul_(trial).sub_(rows).square_().sum(1, keepdim=True)
        scale = torch.where(error < best, trial, scale)
        best = torch.minimum(error, best)
    return torch.where(largest > 0, scale * unit, NO_START).reshape(-1)


@torch.no_grad()
def weight_range(weight: Tensor) -> Tensor:
    """Compute the largest magnitude of a weight.

    For a weight of zeros it is 1/sqrt(fan-in), the range of a newly initialised layer, so that a quantizer whose range
    does not follow the weight can leave zero (our construction).

    Args:
        weight: The weight, `[output channels, ...]`.

    Returns:
        The range, a float32 scalar tensor.

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import weight_range
        >>> weight_range(torch.tensor([[-1.5, 1.0]])), weight_range(torch.zeros(3, 4))
        (tensor(1.5000), tensor(0.5000))
    """
    top = weight.detach().float().abs().max()
    return torch.where(top > 0, top, (weight.numel() / len(weight)) ** -0.5)


@torch.no_grad()
def activation_scale(sample: Tensor, bits: int, *, mse: bool) -> tuple[Tensor, int]:
    """Compute the initial scale and zero point of an activation from a sample of its values.

    A sample of zeros (after a layer that is initialised to zero) gives a range of 1 around zero (our construction).

    Args:
        sample: Values of the activation, of any shape; values that are not finite are ignored.
        bits: The bit-width b.
        mse: True to choose scale and zero point with the least squared error; False for LIMPQ's initial scale
            `2·mean|x|/sqrt(Qp)`, with the zero point of least squared error at that scale.

    Returns:
        (scale, shape `[1]`; zero point). The zero point is 0 if the sample has no negative values; else the codes
        0 … 2^b−1 are shifted by it.

    References:
        LIMPQ (Tang et al., ECCV 2022).

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import activation_scale
        >>> activation_scale(torch.tensor([0.0, 5.0, 10.0, 15.0]), 4, mse=True)
        (tensor([1.]), 0)
    """
    x = sample.detach().float().flatten()
    x = x[torch.isfinite(x)]
    qmax = 2**bits - 1
    size = x.abs().max().item() if x.numel() else 0.0
    if size == 0:
        return torch.full((1,), 1.0 / qmax), 2 ** (bits - 1) if bits > 1 else 0
    unit = 2.0 ** (math.frexp(size)[1] - 1)  # as `_unit`
    x = x / unit
    low, high = x.min().item(), x.max().item()
    if low >= 0:
        zeros = [0]
    else:  # around the zero point that spans the range, and around the symmetric one
        spans = {round(-low / (max(high, 0.0) - low) * qmax), 2 ** (bits - 1)}
        zeros = sorted({min(max(z + d, 0), qmax) for z in spans for d in (-1, 0, 1)})
    best, choice = math.inf, (1.0, 0)
    for z in zeros:
        if mse:
            full = max(high / (qmax - z) if qmax > z else 0.0, -low / z if z else 0.0)
            trials = [full * r for r in _RATIOS.tolist()]
        else:
            trials = [2 * x.abs().mean().item() / math.sqrt(qmax if low >= 0 else max(2 ** (bits - 1) - 1, 1))]
        for s in trials:
            if s <= 0:
                continue
            q = to_int(x, torch.tensor(s), -z, qmax - z).mul_(s)
            error = q.sub_(x).square_().sum().item()
            if error < best:
                best, choice = error, (s, z)
    return torch.full((1,), choice[0] * unit), choice[1]
