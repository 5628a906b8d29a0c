"""The policy of another package at the same budget: NVIDIA ModelOpt's auto_quantize (extra `bench`).

It scores every layer's formats by gradients and picks them with a linear program for a mean number of weight bits.
Activations have one width, and neither BitOps nor bytes are limits of its own: it gets the most weight bits that fit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F

from hub_mpq import HubMPQ, LayerBits, Policy


def weight_format(bits: int, activation: int) -> dict[str, Any]:
    """ModelOpt's configuration of one width, weights per output channel, activations per tensor."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}, "enable": True},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": activation, "axis": None}, "enable": True},
        ],
        "algorithm": "max",
        "effective_bits": float(bits),
    }


def modelopt_policy(
    mpq: HubMPQ, batches: Sequence[Any], widths: Sequence[int], activation: int, limit: str, target: float
) -> Policy:
    """What auto_quantize chooses for the searched layers with the most weight bits that keep `limit` within `target`.

    It is scored once; its linear program is then solved for falling mean widths until its policy fits. Fixed layers
    stay as they are here.
    """
    import modelopt.torch.quantization as mtq

    graph = mpq.graph
    fixed = {layer.name: layer.fixed for layer in graph if layer.fixed is not None}
    formats = [weight_format(bits, activation) for bits in widths]
    _, state = mtq.auto_quantize(
        copy.deepcopy(mpq.float_model),
        constraints={"effective_bits": float(max(widths))},
        quantization_formats=formats,
        module_search_spaces=[
            {
                "module_name_patterns": [layer.name for layer in graph.searched],
                "quantization_formats": formats,
                "allow_no_quant": False,
            }
        ],
        data_loader=batches,
        forward_step=lambda model, batch: model(batch[0]),
        loss_func=lambda output, batch: F.cross_entropy(output, batch[1]),
        disabled_layers=sorted(fixed),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    for mean_bits in np.arange(max(widths), min(widths) - 0.01, -0.02):
        chosen = mtq.get_auto_quantize_config(state, {"effective_bits": float(mean_bits)})
        found = {e["quantizer_name"]: e["cfg"]["num_bits"] for e in chosen["quant_cfg"] if e.get("cfg")}
        bits = {x.name: LayerBits(found[f"{x.name}.weight_quantizer"], activation) for x in graph.searched}
        policy = Policy({**fixed, **bits}, graph.digest)
        if mpq.usage(policy)[limit] <= target:
            return policy
    raise SystemExit(f"no policy of ModelOpt meets {limit} = {target:.4g}")
