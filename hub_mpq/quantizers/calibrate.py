"""Where scales start: the LIMPQ authors' formulas, and the scale of least squared error."""

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
    """The power of two below `top`. Divided by it, which rounds nothing, squares of tiny values are not lost."""
    return torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent - 1)


@torch.no_grad()
def weight_scale_sigma(weight: Tensor, bits: int) -> Tensor:
    """max(|μ−3σ|, |μ+3σ|) / 2^(b−1) of the whole tensor, shape [1] (LIMPQ's initial value).

    NO_START for a weight of zeros.
    """
    w = weight.detach().float()
    unit = _unit(w.abs().max())
    mean, sigma = (w / unit).mean(), (w / unit).std(unbiased=False)
    scale = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 2 ** (bits - 1) * unit
    return torch.where(scale > 0, scale, NO_START).reshape(1)


@torch.no_grad()
def weight_scale_mse(weight: Tensor, bits: int, *, axis: int | None = 0) -> Tensor:
    """Scale of least squared error per channel of `axis` (see `channel_rows`), shape [channels]; axis None: per tensor,
    [1].

    NO_START where all weights are zero.
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
    """The largest magnitude, float32 []; of a weight of zeros 1/sqrt(fan-in), the range of a layer that is initialised
    anew, so that a quantizer whose range does not follow the weight can leave zero [our construction]."""
    top = weight.detach().float().abs().max()
    return torch.where(top > 0, top, (weight.numel() / len(weight)) ** -0.5)


@torch.no_grad()
def activation_scale(sample: Tensor, bits: int, *, mse: bool) -> tuple[Tensor, int]:
    """(scale [1], zero point) of an activation from a sample of its values, any shape.

    mse False: LIMPQ's start 2·mean|x|/sqrt(Qp), the zero point of least squared error at that scale.
    mse True: scale and zero point of least squared error together.
    A sample without negative values has zero point 0; else the codes 0 … 2^b−1 are shifted by it. One of zeros alone
    (behind a layer that starts at zero) tells neither size nor sign: a range of 1 around zero [our construction].
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
