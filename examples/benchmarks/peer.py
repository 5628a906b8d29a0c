"""Policies of other packages at the same budget: mixed weights, activations at one bit-width.

ModelOpt's auto_quantize (extra `bench`) scores the formats of every layer by gradients and picks them with a linear
program for a mean number of weight bits. It has no limits on BitOps or bytes, so it gets the most weight bits that fit.
MCT (`pip install model-compression-toolkit`, in a separate environment, since it pins older packages) measures the
distance of inner activations with one layer quantized and solves for BitOps or bytes of weights.
AutoScheme (`pip install auto-round`) scores groups of 128 weights by the gradient of a decoder's loss and fills a mean
number of weight bits. It needs that loss; for an encoder it fails with "BaseModelOutputWithPoolingAndCrossAttentions
has no attribute 'loss'" (0.16.1).

    python examples/benchmarks/peer.py --mean-bits 3 --policies decoders.json
    python examples/benchmarks/prediction.py --perplexity --policies-file decoders.json
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import texts
import torch
import torch.nn.functional as F

from hub_mpq import HubMPQ, LayerBits, Policy


def weight_format(bits: int, activation: int) -> dict[str, Any]:
    """Return ModelOpt's configuration of one bit-width: weights per output channel, activations per tensor."""
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
    """Return the policy of auto_quantize with the most weight bits that keep `limit` within `target`.

    It is scored once. Its linear program is then solved for decreasing mean bits until its policy fits. Fixed layers
    are the same as in hub_mpq.
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


def node_of(layer: str) -> str:
    """Return the name of a layer in MCT's graph, which adds "_bn" where it folded a BatchNorm."""
    return layer.replace(".", "_")


def mct_policy(
    mpq: HubMPQ, batches: Sequence[Any], widths: Sequence[int], activation: int, limit: str, target: float, level: int
) -> Policy:
    """Return the policy of MCT for the weights of the searched layers within the cost of the uniform `level`.

    Activations are float while it searches. Its limit is lowered by hundredths until `limit` is within `target`. It
    keeps fixed layers at the widest candidate and counts them so.
    """
    import model_compression_toolkit as mct
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit.core.common.network_editors import NodeNameFilter
    from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR
    from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema

    off = schema.AttributeQuantizationConfig(enable_weights_quantization=False)

    def operator(bits: int | None) -> Any:
        kernel = schema.AttributeQuantizationConfig(
            weights_quantization_method=QuantizationMethod.SYMMETRIC,
            weights_n_bits=bits or 8,
            weights_per_channel_threshold=True,
            enable_weights_quantization=True,
        )
        return schema.OpQuantizationConfig(
            default_weight_attr_config=off,
            attr_weights_configs_mapping={KERNEL_ATTR: kernel} if bits else {},
            activation_quantization_method=QuantizationMethod.UNIFORM,
            activation_n_bits=8,
            supported_input_activation_n_bits=8,
            enable_activation_quantization=False,
            quantization_preserving=False,
            fixed_scale=None,
            fixed_zero_point=None,
            simd_size=1,
            signedness=schema.Signedness.AUTO,
        )

    choices = tuple(operator(bits) for bits in sorted(widths, reverse=True))
    mixed = schema.QuantizationConfigOptions(quantization_configurations=choices, base_config=choices[0])
    names = schema.OperatorSetNames
    platform = schema.TargetPlatformCapabilities(
        default_qco=schema.QuantizationConfigOptions(quantization_configurations=(operator(None),)),
        operator_set=tuple(
            schema.OperatorsSet(name=name, qc_options=mixed)
            for name in (names.CONV, names.DEPTHWISE_CONV, names.FULLY_CONNECTED)
        ),
        fusing_patterns=(),
        add_metadata=False,
    )
    graph = mpq.graph
    fixed = {layer.name: layer.fixed for layer in graph if layer.fixed is not None}
    amount = {x.name: (x.macs if limit == "bitops" else x.weight_count) for x in graph}
    unit = 32 if limit == "bitops" else 1 / 8  # float activations count 32 bits; bytes
    most = unit * sum(amount[x.name] * (max(widths) if x.name in fixed else level) for x in graph)
    for part in np.arange(1.0, 0.8, -0.01):
        core = mct.core.CoreConfig(mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=32))
        for name in fixed:
            names_there = [NodeNameFilter(n) for n in (node_of(name), f"{node_of(name)}_bn")]
            core.bit_width_config.set_manual_weights_bit_width(names_there[0] | names_there[1], max(widths), "weight")
        wanted = {"bops" if limit == "bitops" else "weights_memory": float(part * most)}
        quantized, _ = mct.ptq.pytorch_post_training_quantization(
            copy.deepcopy(mpq.float_model),
            lambda: iter([[x.cpu().numpy()] for x, _ in batches]),
            target_resource_utilization=mct.core.ResourceUtilization(**wanted),
            core_config=core,
            target_platform_capabilities=platform,
        )
        found = {
            name.removesuffix("_bn"): next(iter(module.weights_quantizers.values())).num_bits
            for name, module in quantized.named_modules()
            if getattr(module, "weights_quantizers", None)
        }
        bits = {x.name: LayerBits(found[node_of(x.name)], activation) for x in graph.searched}
        policy = Policy({**fixed, **bits}, graph.digest)
        if mpq.usage(policy)[limit] <= target:
            return policy
    raise SystemExit(f"no policy of MCT meets {limit} = {target:.4g}")


def autoscheme_bits(mean_bits: float, widths: Sequence[int] = (2, 3, 4, 8), samples: int = 16) -> dict[str, int]:
    """Return AutoScheme's {layer of SmolLM2: weight bits}, scored on chunks of WikiText-2's validation split."""
    from auto_round import AutoRound, AutoScheme
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = texts.smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [row for batch in texts.chunks("valid", samples) for row in batch["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.json"
        file.write_text(json.dumps([{"text": tokenizer.decode(row)} for row in rows]))
        scheme = AutoScheme(
            avg_bits=mean_bits,
            options=tuple(f"W{bits}A16" for bits in widths),
            nsamples=samples,
            seqlen=128,
            batch_size=2,
            ignore_scale_zp_bits=True,
            low_gpu_mem_usage=False,
        )
        net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        rounder = AutoRound(net, tokenizer, scheme=scheme, iters=0, dataset=str(file), seqlen=128, nsamples=samples)
        rounder.post_init()
    return {name: config["bits"] for name, config in rounder.layer_config.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mean-bits", type=float, default=4.0, help="mean weight bits of AutoScheme; default: 4")
    parser.add_argument("--policies", type=Path, required=True, help="JSON file to create or to add to")
    args = parser.parse_args()
    known = json.loads(args.policies.read_text()) if args.policies.exists() else {}
    began = time.perf_counter()
    bits = {name: f"W{b}A32" for name, b in autoscheme_bits(args.mean_bits).items()}
    known[f"AutoScheme|{args.mean_bits}"] = {"bits": bits, "seconds": time.perf_counter() - began}
    args.policies.write_text(json.dumps(known))


if __name__ == "__main__":
    main()
