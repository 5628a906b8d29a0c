"""What runs a quantized model: every runtime of the package, and what they have in common."""

from __future__ import annotations

from ..core import register_runtime
from .build import certify, to_runtime
from .certificate import Certificate
from .onednn import Onednn
from .onnxruntime import OnnxRuntime
from .openvino import OpenVINO
from .torch_reference import Torch

for _runtime in (Torch, Onednn, OpenVINO, OnnxRuntime):
    register_runtime(_runtime())

__all__ = ["Certificate", "certify", "to_runtime"]
