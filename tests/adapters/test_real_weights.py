"""Real weights: needs the research data beside the repository."""

import os
from pathlib import Path

import pytest

from hub_mpq.adapters import load, observe_signed

SHARED = Path(os.environ.get("HUB_MPQ_DATA") or Path(__file__).parents[3] / "shared")
WEIGHTS = SHARED / "data" / "weights" / "mobilenetv2_100.keras_in1k_int8dq" / "model.safetensors"


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="no research data: set HUB_MPQ_DATA to the folder `shared`")
def test_linear_bottlenecks_are_signed():
    source = load("mobilenetv2_100", checkpoint_path=WEIGHTS, pad_type="same", bn_eps=1e-3)
    signed = observe_signed(source.model, source.graph.names, source.example)
    # ReLU6 stands before all layers but the first and those that read a linear bottleneck
    reads_bottleneck = {f"blocks.{i}.{j}.conv_pw" for i, n in enumerate([2, 3, 4, 3, 3, 1], 1) for j in range(n)}
    assert {name for name, value in signed.items() if value} == {"conv_stem", "conv_head", *reads_bottleneck}
    assert signed.keys() == set(source.graph.names)
