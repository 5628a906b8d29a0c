"""Exact types only."""

import pytest
from torch import nn

from hub_mpq.nn.types import layer_kind, why_not


class MyLinear(nn.Linear):
    pass


def test_kinds():
    from timm.layers import Conv2dSame
    from transformers.pytorch_utils import Conv1D

    kinds = {
        nn.Conv2d(1, 1, 1): "conv2d",
        nn.Linear(1, 1): "linear",
        nn.MultiheadAttention(2, 1).out_proj: "projection",
        nn.Embedding(2, 2): "embedding",
        Conv2dSame(1, 1, 3): "conv2d",
        Conv1D(2, 3): "conv1d",
        nn.Conv1d(1, 1, 1): "convolution1d",
        nn.Conv3d(1, 1, 1): "convolution3d",
        nn.ConvTranspose1d(1, 1, 1): "conv_transpose1d",
        nn.ConvTranspose2d(1, 1, 1): "conv_transpose2d",
        nn.ConvTranspose3d(1, 1, 1): "conv_transpose3d",
    }
    assert {layer_kind(m).name == kind and why_not(m) == "" for m, kind in kinds.items()} == {True}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.GRU(2, 2), "recurrent"),
        (lambda: nn.MultiheadAttention(2, 1), "shared with another module"),
        (lambda: nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "an unknown subclass of nn.Linear"),
        (lambda: nn.utils.spectral_norm(nn.Linear(2, 2)), "computed by a hook"),
        (lambda: MyLinear(2, 2), "an unknown subclass of nn.Linear"),
        (lambda: nn.Bilinear(2, 2, 2), "bilinear"),
    ],
)
def test_what_has_no_form(make, reason):
    module = make()
    assert reason in why_not(module)
    assert layer_kind(module) is None


def test_timm_convolutions_with_their_own_forward():
    from timm.layers import ScaledStdConv2d, StdConv2d

    for module in (StdConv2d(2, 2, 1), ScaledStdConv2d(2, 2, 1)):
        assert layer_kind(module) is None
        assert "with its own forward" in why_not(module)
