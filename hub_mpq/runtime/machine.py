"""The machine in words, as figures need it."""

from __future__ import annotations

import os
import platform

import torch


def machine() -> str:
    """Processor, cores and the widest instructions that torch uses, such as "AMD EPYC 7763, 2 cores, AVX2"."""
    return f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
