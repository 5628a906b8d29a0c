"""Time to load a packed file of 100 million weights, beside safetensors' load of the same model in float32.

    python examples/benchmarks/pack.py [--rounds 11] [--threads 1]

Both sides end with every tensor of the model as float32 in separate memory. The files are warm (read once before).
Rounds alternate; medians are printed with the fastest and slowest round. The aim: at most 5 times the float load
without the SHA-256 of the file, which is shown separately.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub_mpq.core import LayerBits, LayerGraph, LayerSpec, Policy
from hub_mpq.pack import Manifest, PackedTensor, pack_weight, read_packed, write_packed

AIM = 5.0
WIDTHS = (2, 3, 4, 5, 6, 8)


def network() -> LayerGraph:
    """Return 100.1 million weights: six transformer blocks of width 1024, ten 3×3 convolutions, an embedding."""
    shapes: list[tuple[str, str, tuple[int, ...]]] = [("embed", "embedding", (1000, 1024))]
    for i in range(6):
        shapes += [(f"blocks.{i}.attn.{part}", "linear", (1024, 1024)) for part in "qkvo"]
        shapes += [(f"blocks.{i}.up", "linear", (4096, 1024)), (f"blocks.{i}.down", "linear", (1024, 4096))]
    shapes += [(f"convs.{i}", "conv2d", (512, 512, 3, 3)) for i in range(10)]
    layers = [
        LayerSpec(name, kind, shape, 1, torch.Size(shape).numel(), 1, fixed=LayerBits(WIDTHS[i % len(WIDTHS)], 32))
        for i, (name, kind, shape) in enumerate(shapes)
    ]
    return LayerGraph("synthetic", None, "module", (3, 224, 224), tuple(layers))


def build(folder: Path) -> tuple[Path, Path, int]:
    """Write both files and return their paths and the number of weights."""
    graph = network()
    rng = torch.Generator().manual_seed(0)
    packed: dict[str, PackedTensor | Tensor] = {}
    for layer in graph:
        bits = layer.fixed.weight if layer.fixed else 8
        value = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), layer.weight_shape, generator=rng, dtype=torch.int8)
        scale = torch.rand(layer.weight_shape[0], generator=rng) * 0.1 + 0.001
        packed[layer.name] = pack_weight(value, scale, layer.kind, bits)
        packed[f"{layer.name}.bias"] = torch.randn(layer.weight_shape[0], generator=rng)
    manifest = Manifest("synthetic", None, "module", graph, Policy.uniform(graph, "W8A32"))
    write_packed(folder / "packed.safetensors", packed, replace(manifest, provenance={"seed": 0}))
    save_file({k: v.contiguous() for k, v in dense(packed).items()}, folder / "float.safetensors")
    return folder / "packed.safetensors", folder / "float.safetensors", sum(layer.weight_count for layer in graph)


def dense(tensors: dict[str, PackedTensor | Tensor]) -> dict[str, Tensor]:
    """Return the model in float32, every tensor in separate memory."""
    return {
        f"{name}.weight" if isinstance(value, PackedTensor) else name: value.dequantize()
        if isinstance(value, PackedTensor)
        else value.clone()
        for name, value in tensors.items()
    }


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return (wall, CPU) milliseconds of one call, without freeing its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    kept = call()
    spent = (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3
    del kept
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="default: 11")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        packed, plain, count = build(Path(folder))
        data = packed.read_bytes()
        ours, theirs = dense(read_packed(packed)[0]), load_file(plain)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            raise SystemExit("the two files contain different models")
        del ours, theirs
        steps: dict[str, Callable[[], object]] = {
            "float32: load_file and clone": lambda: {k: v.clone() for k, v in load_file(plain).items()},
            "packed: read, verify, unpack, dequantize": lambda: dense(read_packed(packed)[0]),
            "of which reading and verifying": lambda: read_packed(packed),
            "of which SHA-256": lambda: hashlib.sha256(data).digest(),
        }
        rounds = [{name: timed(call) for name, call in steps.items()} for _ in range(args.rounds)]
        sizes = plain.stat().st_size / 1e6, packed.stat().st_size / 1e6
    print(f"{count / 1e6:.1f} M weights at {WIDTHS} bits; {sizes[0]:.1f} MB in float32, {sizes[1]:.1f} MB packed;")
    print(f"{args.threads} thread(s), median of {args.rounds} rounds (fastest–slowest), torch {torch.__version__}\n")
    print("| step | wall ms | CPU ms |\n|---|---|---|")
    medians = []
    for name in steps:
        columns = [[row[name][i] for row in rounds] for i in (0, 1)]
        medians.append([statistics.median(column) for column in columns])
        cells = [f"{statistics.median(c):.0f} ({min(c):.0f}–{max(c):.0f})" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    plain_ms, packed_ms, _, sha_ms = medians
    ratios = [(packed_ms[i] - sha_ms[i]) / plain_ms[i] for i in (0, 1)]
    print(f"| packed without SHA-256 over float32 | {ratios[0]:.2f}× | {ratios[1]:.2f}× |")
    print(f"| packed over float32 | {packed_ms[0] / plain_ms[0]:.2f}× | {packed_ms[1] / plain_ms[1]:.2f}× |")
    print(f"\naim: at most {AIM}× without SHA-256: {'reached' if max(ratios) <= AIM else 'MISSED'}")


if __name__ == "__main__":
    main()
