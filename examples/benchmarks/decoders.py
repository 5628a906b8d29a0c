"""Perplexity of a decoder with quantized weights, and the cost of quantizing it.

    python examples/benchmarks/decoders.py
    python examples/benchmarks/decoders.py --whole "gptq 128 W4" --whole "float"
    python examples/benchmarks/decoders.py --row "autoround 128 W4"
    python examples/benchmarks/decoders.py --report

SmolLM2-135M, weights only, with its embedding (which is also its head) in float. Calibrated on 32 chunks of 256 tokens
of WikiText-2's validation split and measured on 16 chunks of 256 tokens of its test split; with --whole on the whole
test file in windows of 1,024 tokens. Methods: data-free (no calibration); nearest (grids of least output error); gptq;
mixed (the policy that measured best within a mean of integer bits). Only by --row, since it needs
`pip install auto-round`: autoround (rounding learned in --steps steps per block on the same chunks, symmetric, 16-bit
scales, hence equal bytes). Each row runs in a separate process, which reports CPU-seconds (user and system, all
threads) and peak memory. Rows are kept in the cache folder ($HUB_MPQ_CACHE).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import study
import texts
from images import cache_root

from hub_mpq import HubMPQ
from hub_mpq.cost.size import layer_nbytes

GROUPS = {"channel": None, "128": 128, "64": 64}
ROWS = [
    "float",
    *(
        f"{method} {group} {level}"
        for level in ("W4", "W3")
        for method in ("data-free", "nearest", "gptq")
        for group in GROUPS
    ),
    *(f"mixed {group}" for group in GROUPS),
]
MEANS = (4.0, 3.5, 3.0)
CALIBRATION, VALIDATION = 32, 16
"""Numbers of chunks of 256 tokens; those for validation follow the others."""


def folder() -> Path:
    """Return the folder of the rows."""
    found = cache_root() / "decoders"
    found.mkdir(parents=True, exist_ok=True)
    return found


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_bytes() -> int:
    """Return the peak memory of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def figures(mpq: HubMPQ, began: float) -> dict[str, Any]:
    """Return the size, the cost and the losses of a quantized model."""
    with tempfile.TemporaryDirectory() as out:
        saved = mpq.save_pretrained(out)
    spent, peak = cpu_seconds() - began, peak_bytes()
    graph = mpq.graph
    assert mpq.policy is not None
    count = sum(x.weight_count for x in graph.searched)
    usage = mpq.usage()
    return {
        "file": saved,
        "mean_bits": usage["weight_bits"],
        "effective_bits": 8 * sum(layer_nbytes(x, mpq.policy.bits[x.name]) for x in graph.searched) / count,
        "cpu_seconds": spent,
        "peak_bytes": peak,
        "losses": texts.token_losses(mpq, texts.chunks("test", 16)),
    }


def calibration() -> list[dict[str, Any]]:
    """Return batches of two chunks, of which the first 16 are read."""
    whole = texts.chunks("valid", CALIBRATION)
    return [{key: rows[i : i + 2] for key, rows in batch.items()} for batch in whole for i in (0, 2)]


def run(row: str, steps: int = 50) -> Iterator[dict[str, Any]]:
    """Yield the figures of one row, or of one for each mean bit-width. steps: of AutoRound, per block."""
    began = cpu_seconds()
    method, *rest = row.split()
    if method == "autoround":
        yield autoround(row, steps)
        return
    mpq = texts.smollm2()
    if method == "float":
        yield {"row": row, "losses": texts.token_losses(mpq, texts.chunks("test", 16))}
        return
    group = GROUPS[rest[0]]
    train = calibration()
    if method != "mixed":
        data, rounding = (None, None) if method == "data-free" else (train, method)
        mpq.apply_policy(rest[1], data, group_size=group, rounding=rounding)
        yield {"row": row, **figures(mpq, began)}
        return
    held = texts.chunks("valid", VALIDATION, first=CALIBRATION)
    with tempfile.TemporaryDirectory() as states:
        for bits in MEANS:
            mpq.quantize(
                weight_bits=bits,
                train=train,
                epochs=0,
                group_size=group,
                validate=held,
                checkpoint_dir=states,
                resume=True,
            )
            told = {"seconds": dict(mpq.seconds), "chosen_by": mpq.result.chosen_by if mpq.result else ""}
            yield {"row": f"{row} {bits}", **figures(mpq, began), **told}
            began = cpu_seconds()  # the next one reuses scores and rounded weights


def autoround(row: str, steps: int) -> dict[str, Any]:
    """Return the figures of AutoRound at a level and a group size, on the calibration chunks of the other rows."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began = cpu_seconds()
    path, (group, level) = texts.smollm2_path(), row.split()[1:]
    rows = [{"input_ids": ids[None]} for batch in calibration() for ids in batch["input_ids"]]
    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rounder = AutoRound(
        net,
        AutoTokenizer.from_pretrained(path),
        scheme="W4A16",
        bits=int(level[1:]),
        group_size=GROUPS[group] or -1,
        sym=True,
        iters=steps,
        dataset=rows,
        seqlen=256,
        nsamples=CALIBRATION,
        batch_size=4,
    )
    quantized, _ = rounder.quantize()
    spent, peak = cpu_seconds() - began, peak_bytes()
    usage = texts.smollm2().usage(f"{level}{'' if group == 'channel' else f'g{group}'}A32")
    losses = texts.token_losses(quantized, texts.chunks("test", 16))
    bits = int(level[1:])
    return {
        "row": row,
        "steps": steps,
        "file": usage["size"],
        "mean_bits": usage["weight_bits"],
        "effective_bits": bits + 16 / GROUPS[group] if GROUPS[group] else bits,
        "cpu_seconds": spent,
        "peak_bytes": peak,
        "losses": losses,
    }


def whole(row: str) -> dict[str, Any]:
    """Return the perplexity on the whole test file in windows of 1,024 tokens."""
    mpq = texts.smollm2()
    method, *rest = row.split()
    if method != "float":
        mpq.apply_policy(rest[1], calibration(), group_size=GROUPS[rest[0]], rounding=method)
    began = time.perf_counter()
    found = mpq.perplexity(texts.data_root() / "text" / "wikitext2" / "test.txt", context=1024)
    return {"row": f"whole {row}", "perplexity": found["perplexity"], "seconds": time.perf_counter() - began, **found}


def report() -> None:
    """Print the table of the finished rows in Markdown."""
    rows = [json.loads(file.read_text()) for file in sorted(folder().glob("*.json"))]
    by_name = {row["row"]: row for row in rows}
    print("| method | scales | mean bits | effective bits | file, MB | perplexity | CPU-seconds | peak memory, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "losses" not in row or row["row"] == "float":
            continue
        method, group, _ = row["row"].split()
        scales = "per channel" if group == "channel" else f"groups of {group}"
        print(
            f"| {method} | {scales} | {row['mean_bits']:.2f} | {row['effective_bits']:.2f} | {row['file'] / 1e6:.1f} "
            f"| {np.exp(np.mean(row['losses'])):.2f} | {row['cpu_seconds']:.0f} | {row['peak_bytes'] / 1e9:.1f} |"
        )
    if "float" in by_name:
        print(f"\nfloat: {np.exp(np.mean(by_name['float']['losses'])):.2f}")
    for name, row in by_name.items():
        if name.startswith("whole"):
            print(f"\n{name}, windows of {row['context']} tokens, {row['tokens']:,} tokens: {row['perplexity']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--row", help="run this row in this process")
    parser.add_argument("--steps", type=int, default=50, help="steps of AutoRound per block")
    parser.add_argument("--whole", action="append", default=[], help="row to measure on the whole test file too")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        return report()
    if args.row or args.whole:
        for found in run(args.row, args.steps) if args.row else map(whole, args.whole):
            study.write(folder() / f"{found['row'].replace(' ', '-')}.json", found)
            print(found["row"], {k: v for k, v in found.items() if k not in ("losses", "row")}, flush=True)
        return None
    for row in ROWS:
        last = f"{row} {MEANS[-1]}" if row.startswith("mixed") else row
        if not (folder() / f"{last.replace(' ', '-')}.json").exists():
            subprocess.run([sys.executable, __file__, "--row", row], check=True)
    return None


if __name__ == "__main__":
    main()
