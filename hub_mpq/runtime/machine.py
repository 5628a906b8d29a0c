"""Description of the machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ..core import Runtime


def machine() -> str:
    """Processor, cores and the instruction set that torch uses, such as "AMD EPYC 7763, 2 cores, AVX2"."""
    return f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def has_vnni() -> bool:
    """Whether this CPU sums products of 8-bit integers in 32 bits.

    x86 CPUs do if they have AVX-VNNI or AVX-512 VNNI; all other CPUs do. False if an x86 CPU's flags are unknown.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool({"avx512_vnni", "avx_vnni"} & set(_cpuinfo("flags").split()))


def engine(runtime: Runtime) -> str:
    """The library behind a runtime with its version, such as "openvino 2026.4.1"."""
    try:
        return f"{runtime.package} {version(runtime.package)}"
    except PackageNotFoundError:  # a build under another name, such as onnxruntime-openvino
        return runtime.package


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """An entry of /proc/cpuinfo for the first core; "" if there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(key)), "")
    except OSError:
        return ""
