"""Runtimes execute quantized models; each one has a file, and this package what they share."""

from __future__ import annotations

from ..core import register_runtime, register_target
from ..export.gguf_types import GGUF
from ..export.vllm import VLLM
from .bit_serial import BitSerial
from .build import certify, to_runtime
from .certificate import Certificate
from .latency import measure_latency, policy_latency, runtime_here
from .latency_limit import MetLatency, check_table, meet_latency
from .onednn import Onednn
from .onnxruntime import OnnxRuntime
from .openvino import OpenVINO
from .targets import runtime_targets
from .timing import Timing, time_calls
from .torch_reference import Torch

for _runtime in (Torch, Onednn, OpenVINO, OnnxRuntime, BitSerial):
    register_runtime(_runtime())
for _target in (VLLM(), GGUF(), *runtime_targets()):
    register_target(_target)

__all__ = [
    "Certificate",
    "MetLatency",
    "Timing",
    "certify",
    "check_table",
    "measure_latency",
    "meet_latency",
    "policy_latency",
    "runtime_here",
    "time_calls",
    "to_runtime",
]
