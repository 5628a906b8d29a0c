"""Quantizers, one parametrization per file, shared by search, fine-tuning and packing."""

from .base import Quantizer
from .calibrate import activation_scale, weight_range, weight_scale_mse, weight_scale_sigma
from .fake_quantize import fake_quantize
from .fake_quantize_kernels import to_int
from .grouped import GroupedLSQ
from .lsq import LSQ, compile_quantizers

__all__ = [
    "LSQ",
    "GroupedLSQ",
    "Quantizer",
    "activation_scale",
    "compile_quantizers",
    "fake_quantize",
    "to_int",
    "weight_range",
    "weight_scale_mse",
    "weight_scale_sigma",
]
