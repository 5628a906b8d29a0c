"""GPT-2's linear layer in its packed form, apart from the others: its float type is transformers', which is slow to
import."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .fused import Product
from .packed import PackedLayer, packed_product


class PackedConv1D(PackedLayer, Conv1D):  # type: ignore[misc]
    """x [..., in] to [..., out]. A Conv1D for who looks for one, as PEFT does."""

    __repr__ = nn.Module.__repr__

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(self, Product(transposed=True), x)
