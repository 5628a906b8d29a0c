"""GPT-2's linear layer in its packed form, in a separate module because its float type is from transformers, which is
slow to import."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .fused import Product
from .layers import first_operand
from .packed import PackedLayer, packed_product


class PackedConv1D(PackedLayer, Conv1D):  # type: ignore[misc]
    """x [..., in] to [..., out]. A subclass of Conv1D, because PEFT looks for one."""

    __repr__ = nn.Module.__repr__

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return packed_product(self, Product(transposed=True), first_operand(args, kwargs))
