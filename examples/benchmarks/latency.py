"""Check that policies keep a limit on their latency.

    ONEDNN_MAX_CPU_ISA=AVX2 python examples/benchmarks/latency.py
    python examples/benchmarks/latency.py --runtime bit_serial --model resnet18

MobileNetV1 and DeiT-S with random weights, at limits between the fastest and the slowest policy of the latency table.
Scores are the errors of the weights, so only the times are meaningful. The first command keeps oneDNN from using VNNI,
which many x86 CPUs lack: W8A8 layers then compute in float, W4A8 layers in integers, and the solver chooses. On
bit_serial the bit-widths 1, 2 and 4 differ in time. One thread, batch 1; each policy is built and timed as a whole.
"""

from __future__ import annotations

import argparse
import warnings

from hub_mpq import Candidates, HubMPQ
from hub_mpq.errors import HubMPQError
from hub_mpq.runtime.machine import machine

NAMES = {"mobilenetv1": "mobilenetv1_100", "deit_s": "deit_small_patch16_224", "resnet18": "resnet18"}


def run(model: str, runtime: str) -> None:
    """Print the rows of one model."""
    candidates = Candidates((1, 2, 4), (1, 2, 4)) if runtime == "bit_serial" else Candidates((4, 8), (8,))
    mpq = HubMPQ.from_pretrained(NAMES[model], pretrained=False)
    table = mpq.measure_latency(runtime, candidates=candidates)
    pairs = [str(bits) for bits in candidates.pairs]
    rows = [[row[pair] for pair in pairs] for row in table.entries.values()]
    low, high = (table.constant + sum(map(of, rows)) for of in (min, max))
    for part in (0.3, 0.6, 0.9):
        limit = low + (high - low) * part
        try:
            mpq.quantize(latency=limit, latency_table=table, candidates=candidates, strategy="mse", steps=0, epochs=0)
        except HubMPQError as error:
            print(f"| {model} | {runtime} | {1e3 * limit:.2f} | {error} | | |", flush=True)
            continue
        found = mpq.history["latency"]
        off = 100 * (found["measured"] / limit - 1)
        took = f"{1e3 * found['measured']:.2f} ± {1e3 * found['spread']:.2f}"
        bits = mpq.usage()["weight_bits"]
        print(f"| {model} | {runtime} | {1e3 * limit:.2f} | {took} | {off:+.1f} % | {bits:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, action="append", help="default: mobilenetv1 and deit_s")
    parser.add_argument("--runtime", default="onednn", help="default: onednn")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{machine()}\n\n| model | runtime | limit, ms | measured, ms | relative to the limit | mean weight bits |")
    print("|---|---|---|---|---|---|")
    for model in args.model or ("mobilenetv1", "deit_s"):
        run(model, args.runtime)


if __name__ == "__main__":
    main()
