"""Speed of bit-serial convolutions against float32 and int8, on the 3×3 shapes of ResNet-18, one image.

    python examples/benchmarks/bit_serial.py [--rounds 15] [--threads 1]

Process CPU time of one layer: float32 by torch (the faster of its two memory formats), int8 by torch's oneDNN
operators, and the runtime `bit_serial`. Rounds alternate; medians are printed with the fastest and slowest round. In
the first table inputs are codes, as between layers of a network; in the second they are quantized from float32. Outputs
are float32 and are first checked against the exact sums. The aims at one thread: W1A1 at least four times as fast as
float32, W2A2 faster.

To emulate a CPU without AVX-512 on one that has it:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 NUMBA_CPU_NAME=haswell \\
    NUMBA_CPU_FEATURES=+avx2,+fma,+bmi,+bmi2,+popcnt,+lzcnt python examples/benchmarks/bit_serial.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hub_mpq.runtime.bit_serial import BitSerialLayer
from hub_mpq.runtime.exchanged import Codes
from hub_mpq.runtime.fused_layer import FusedLayer
from hub_mpq.runtime.integer_layer import Grid, IntegerLayer
from hub_mpq.runtime.machine import machine
from hub_mpq.runtime.onednn import OnednnLayer

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
WIDTHS = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4))
AIMS = {"W1A1": 4.0, "W2A2": 1.0}
CALLS = 5
"""In one round."""

Way = Callable[[], Tensor]


def plan(channels: int, size: int, bits: int, x_bits: int, generator: torch.Generator) -> FusedLayer:
    """Return a layer with random codes, scales of 1 and a zero point."""
    codes = torch.randint(2**bits, (channels, channels, 3, 3), generator=generator)
    codes = 2 * codes - 1 if bits == 1 else codes - 2 ** (bits - 1)
    grid = Grid(1.0, 2**x_bits // 3, x_bits)
    layer = IntegerLayer(
        "layer", codes.to(torch.int8), bits, torch.ones(channels), None, grid, stride=(1, 1), padding=(1, 1)
    )
    return FusedLayer(layer, shape=(1, channels, size, size))


def checked(name: str, layer: Any, chosen: FusedLayer, codes: Tensor) -> Any:
    """Return the layer if its sums are exact; SystemExit otherwise."""
    integers = chosen.layer
    x = codes.double() - integers.grid.zero_point
    if not torch.equal(layer(codes).double(), F.conv2d(x, integers.weight.double(), padding=integers.padding)):
        raise SystemExit(f"{name} is not exact")
    return layer


def float_ways(chosen: FusedLayer, x: Tensor) -> dict[str, Way]:
    """Return float32 calls in both memory formats."""
    weight, plain = chosen.layer.weight.float(), x.contiguous()
    packed = weight.contiguous(memory_format=torch.channels_last)
    return {
        "float32, NCHW": lambda: F.conv2d(plain, weight, padding=1),
        "float32, NHWC": lambda: F.conv2d(x, packed, padding=1),
    }


def ways(channels: int, size: int) -> tuple[dict[str, Way], dict[str, Way]]:
    """Return {name: call} for inputs as codes, and for inputs from float32."""
    generator = torch.Generator().manual_seed(0)
    coded: dict[str, Way] = {}
    whole: dict[str, Way] = {}
    for bits, x_bits in WIDTHS:
        chosen = plan(channels, size, bits, x_bits, generator)
        grid = chosen.layer.grid
        drawn = torch.randint(2**x_bits, chosen.shape, dtype=torch.uint8, generator=generator)
        codes = drawn.contiguous(memory_format=torch.channels_last)
        x = codes.float() - grid.zero_point
        kinds = {f"W{bits}A{x_bits}": BitSerialLayer}
        if not coded:
            coded = float_ways(chosen, x)
            whole = dict(coded)
            kinds = {"int8": OnednnLayer, **kinds}
        for name, kind in kinds.items():
            layer, to_codes = checked(name, kind(chosen), chosen, codes), Codes(grid)
            coded[name] = lambda layer=layer, codes=codes: layer(codes)
            whole[name] = lambda layer=layer, x=x, to_codes=to_codes: layer(to_codes(x))
    return coded, whole


def measured(calls: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Return {name: milliseconds of a call in each round}."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(CALLS):
                call()
            found[name].append((time.process_time() - start) / CALLS * 1e3)
    return found


def rows(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Keep only the faster memory format of float32."""
    floats = sorted(
        (name for name in found if name.startswith("float32")), key=lambda name: statistics.median(found[name])
    )
    return {"float32": found[floats[0]]} | {name: times for name, times in found.items() if name not in floats}


def table(title: str, results: list[dict[str, list[float]]]) -> None:
    heads = [f"{channels} channels, {size}×{size}" for channels, size in SHAPES]
    print(f"\n{title}\n\n| ms, × float32, × int8 | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name in results[0]:
        cells = []
        for result in results:
            times, plain, int8 = result[name], *(statistics.median(result[other]) for other in ("float32", "int8"))
            median = statistics.median(times)
            spread = f"{median:.3f} ({min(times):.3f}–{max(times):.3f})"
            cells.append(f"{spread}, {plain / median:.2f}×, {int8 / median:.2f}×")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        both = [[rows(measured(calls, args.rounds)) for calls in ways(*shape)] for shape in SHAPES]
    times = f"median of {args.rounds} rounds (fastest–slowest)"
    print(f"{machine()}; {args.threads} thread(s), {times}, torch {torch.__version__}")
    coded, whole = zip(*both, strict=True)
    table("Inputs as codes:", list(coded))
    table("Inputs in float32:", list(whole))
    print()
    for name, aim in AIMS.items():
        least = min(statistics.median(row["float32"]) / statistics.median(row[name]) for row in coded)
        verdict = "reached" if least >= aim else "MISSED"
        print(f"aim: {name} at least {aim:g}× float32 on each shape: {least:.2f}×, {verdict}")


if __name__ == "__main__":
    main()
