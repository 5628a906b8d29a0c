"""All search strategies on one piece of work: CIFAR-10 ResNet-20, equal image passes to search, equal fine-tuning.

    python examples/benchmarks/strategies.py            # every row that is not in the cache folder yet
    python examples/benchmarks/strategies.py --only DQ --seeds 1 --search-steps 20 --tune-steps 20
    python examples/benchmarks/strategies.py --report

Two budgets: the BitOps of W3A3 (three seeds), and the bytes of W2 with 4-bit activations (one seed). Each finished row
is one JSON line in the cache folder ($HUB_MPQ_CACHE), so a stopped run goes on where it was; rows of other settings
stand beside them. An image pass is one image through the network once: LIMPQ makes one a width and one more, so it gets
that part of the steps.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import images
import numpy as np
import torch
from peer import modelopt_policy
from policies import random_policy, reversed_scores
from tasks import cifar_train, lifted_resnet20
from torch.utils.data import Subset

from hub_mpq import Budget, Candidates, HubMPQ, Indicators, Policy
from hub_mpq.search.candidates import resolve_candidates
from hub_mpq.search.policy_search import search_policy

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform LSQ": ("", {}),
    "random": ("", {}),
    "reversed LIMPQ": ("limpq", {}),
    "LIMPQ": ("limpq", {}),
    "DQ (d, qmax)": ("dq", {}),
    "DQ (b, d)": ("dq", {"parametrization": "bits-step"}),
    "DQ (b, qmax)": ("dq", {"parametrization": "bits-range"}),
    "EBS bilevel": ("ebs", {}),
    "EBS mixed, Gumbel": ("ebs", {"update": "mixed", "gumbel": True}),
    "SEAM, 4 % proxy": ("seam", {"proxy": 0.04}),
    "BSQ": ("bsq", {}),
    "gradient": ("gradient", {}),
    "Hessian": ("hessian", {}),
    "MSE": ("mse", {}),
    "KL": ("kl", {}),
    "ModelOpt": ("", {}),
}
LEVELS: dict[str, dict[str, Any]] = {
    "W3A3": {
        "budget": {"bitops": "W3A3"},
        "limit": "bitops",
        "uniform": "W3A3",
        "candidates": Candidates(),
        "seeds": 3,
    },
    "bytes of W2, A4": {
        "budget": {"size": "W2"},
        "limit": "size",
        "uniform": "W2A4",
        "candidates": Candidates((1, 2, 3, 4), (4,)),
        "seeds": 1,
    },
}


def policy_of(
    mpq: HubMPQ, row: str, level: dict[str, Any], seed: int, args: argparse.Namespace
) -> tuple[Policy, float]:
    """(policy, seconds of the search)."""
    strategy, options = ROWS[row]
    began = time.perf_counter()
    if row == "uniform LSQ":
        return Policy.uniform(mpq.graph, level["uniform"]), 0.0
    candidates = {layer.name: level["candidates"] for layer in mpq.graph.searched}
    target = mpq.usage(level["uniform"])[level["limit"]]
    if row == "ModelOpt":  # it has no 1-bit weights
        widths = [b for b in level["candidates"].weight if b > 1]
        batches = list(islice(cifar_train(seed, args.batch), 8))
        policy = modelopt_policy(mpq, batches, widths, int(level["uniform"][-1]), level["limit"], target)
        return policy, time.perf_counter() - began
    if row == "random":
        flat = resolve_candidates(mpq.graph, candidates)
        tables = (
            {n: dict.fromkeys(getattr(c, side), 0.0) for n, c in flat.items()} for side in ("weight", "activation")
        )
        mpq.scores = Indicators(*tables)
        return random_policy(mpq, level["limit"], target, np.random.default_rng(seed)), 0.0
    if strategy == "bsq" and level["limit"] == "bitops":
        options = {**options, "activation_bits": int(level["uniform"][-1])}
    widths = len({*level["candidates"].weight, *level["candidates"].activation})
    steps = max(args.search_steps // (widths + 1), 1) if strategy == "limpq" else args.search_steps
    mpq.train_scores(
        cifar_train(seed, args.batch),
        strategy=strategy,
        strategy_options=options,
        candidates=candidates,
        budget=level["budget"],
        steps=steps,
        seed=seed,
    )
    budget = Budget(**level["budget"])
    if row.startswith("reversed"):
        scores = reversed_scores(mpq.score_table()[0])
        result = search_policy(mpq.graph, scores, budget, base_bytes=mpq.base_bytes(), strategy="reversed")
    else:
        result = mpq.search(budget)
    return result.policy, time.perf_counter() - began


def run(row: str, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: search, fine-tune from the float weights, measure."""
    level = LEVELS[name]
    mpq = HubMPQ.from_module(lifted_resnet20(), torch.zeros(1, 3, 32, 32), model_id="resnet20")
    policy, seconds = policy_of(mpq, row, level, seed, args)
    train = cifar_train(seed, args.batch)
    mpq.apply_policy(policy, train, reestimate_norms=False)
    mpq.finetune(train, steps=args.tune_steps, lr=1e-4, scale_lr=3e-3, seed=seed)
    data = images.Images(*images.cifar10("test"), images.CIFAR_MEAN, images.CIFAR_STD)
    measured = mpq.evaluate(images.loader(Subset(data, range(args.test)), 500))
    usage = mpq.usage()
    return {
        "key": key(row, name, seed, args),
        "row": row,
        "level": name,
        "seed": seed,
        "top1": measured["top1"],
        "bitops": usage["bitops"],
        "bytes": usage["size"],
        "seconds": seconds,
        "policy": {k: str(v) for k, v in policy.bits.items()},
    }


def key(row: str, level: str, seed: int, args: argparse.Namespace) -> str:
    return f"{row}|{level}|{seed}|{args.search_steps}|{args.tune_steps}|{args.batch}|{args.test}"


def report(done: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """The markdown tables of the rows with these settings."""
    lines = [f"{args.search_steps} search steps and {args.tune_steps} fine-tuning steps of {args.batch} images"]
    for name, level in LEVELS.items():
        lines += ["", f"### {name}", "", "| strategy | top-1 | spread | seeds | M BitOps | bytes | search s |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in ROWS:
            found = [done[k] for s in range(level["seeds"]) if (k := key(row, name, s, args)) in done]
            if found:
                top1 = [r["top1"] for r in found]
                means = [np.mean([r[x] for r in found]) for x in ("bitops", "bytes", "seconds")]
                lines.append(
                    f"| {row} | {np.mean(top1):.2f} | {np.std(top1):.2f} | {len(found)} | {means[0] / 1e6:.1f} "
                    f"| {means[1]:.0f} | {means[2]:.1f} |"
                )
    return "\n".join(lines)


def read(file: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []
    return {row["key"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--level", choices=sorted(LEVELS), help="one budget only")
    parser.add_argument("--seeds", type=int, help="at most so many")
    parser.add_argument("--search-steps", type=int, default=100)
    parser.add_argument("--tune-steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, run nothing")
    args = parser.parse_args()
    file = images.cache_root() / "strategies.jsonl"
    rounds = [
        (seed, row, name)
        for seed in range(args.seeds or 3)
        for name, level in LEVELS.items()
        for row in ROWS
        if seed < level["seeds"] and args.level in (None, name) and (args.only or "") in row
    ]
    for seed, row, name in () if args.report else rounds:
        if key(row, name, seed, args) in read(file):
            continue
        found = run(row, name, seed, args)
        with file.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print(f"{name}, {row}, seed {seed}: {found['top1']:.2f} % in {found['seconds']:.1f} s", flush=True)
    print(report(read(file), args))


if __name__ == "__main__":
    main()
