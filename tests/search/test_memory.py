"""Peak memory, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc"
)


def printed(script, *arguments):
    """What a script beside this file prints as JSON."""
    # freed memory is returned at once, so that what is resident is what is used
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def test_memory_does_not_grow_with_depth():
    """Beyond the model's own, of second moments, GPTQ and scores; a block's activations are a fifth of it."""
    shallow, deep = printed("memory_by_depth.py", "8", "32")
    for work in ("rounding", "scores"):
        assert deep[work] < 1.15 * shallow[work], (work, shallow, deep)


def test_memory_of_measuring_does_not_grow_with_batches():
    """Of logits over a large vocabulary: those of both models on one batch, and less than two more of them on the way
    to their divergence."""
    few, many = printed("memory_by_batches.py", "2", "8")
    assert many < 1.15 * few, (few, many)
    assert many < 4, (few, many)
