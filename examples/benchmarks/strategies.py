"""All search strategies on CIFAR-10 ResNet-20, with equal image passes for the search and equal fine-tuning.

    python examples/benchmarks/strategies.py            # every row that is not finished
    python examples/benchmarks/strategies.py --only DQ --seeds 1 --search-steps 20 --tune-steps 20
    python examples/benchmarks/strategies.py --report

Three budgets, three seeds each: the BitOps of W3A3 and of W2A2, and the bytes of W2 with 4-bit activations. Each
finished row is one JSON line in the cache folder ($HUB_MPQ_CACHE), so a stopped run can be continued; rows of other
settings are kept too. It runs on the GPU if available. An image pass is one image through the network once: LIMPQ makes
one per bit-width plus one in each step, so it gets correspondingly fewer steps.

Other packages may be installed on another machine than the one that fine-tunes. Their policies are kept in a file:

    python examples/benchmarks/strategies.py --only peer --policies peers.json --tune-steps 0 --test 1000
    python examples/benchmarks/strategies.py --policies peers.json
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
from peer import mct_policy, modelopt_policy
from policies import random_policy, reversed_scores
from study import commit, device_name
from tasks import HELD, LEVELS, TASKS, cifar_test, cifar_train
from torch.utils.data import Subset

from hub_mpq import Budget, HubMPQ, Indicators, LayerBits, Policy
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
    "peer ModelOpt": ("", {}),
    "peer MCT": ("", {}),
}
HERE = ("W3A3", "W2A2", "bytes of W2")
SEEDS = 3
PEER_BATCHES = 8


def peers_policy(mpq: HubMPQ, row: str, name: str, seed: int, args: argparse.Namespace) -> tuple[Policy, float]:
    """Return (policy of another package, seconds of its search), from the file of policies if it has one."""
    known = json.loads(args.policies.read_text()) if args.policies and args.policies.exists() else {}
    id = f"{row}|{name}|{seed}|{args.batch}"
    if id not in known:
        began, level = time.perf_counter(), LEVELS[name]
        batches = list(islice(cifar_train(seed, args.batch, HELD), PEER_BATCHES))
        uniform = Policy.uniform(mpq.graph, level.uniform).bits[mpq.graph.searched[0].name]
        target = mpq.usage(level.uniform)[level.limit]
        widths = level.widths.weight
        if row == "peer MCT":
            policy = mct_policy(mpq, batches, widths, uniform.activation, level.limit, target, uniform.weight)
        else:  # it has no 1-bit weights
            widths = tuple(b for b in widths if b > 1)
            policy = modelopt_policy(mpq, batches, widths, uniform.activation, level.limit, target)
        bits = {layer: str(b) for layer, b in policy.bits.items()}
        known[id] = {"bits": bits, "seconds": time.perf_counter() - began, "device": device_name()}
        if args.policies:
            args.policies.write_text(json.dumps(known, indent=1))
    found = known[id]
    bits = {layer: LayerBits.parse(b) for layer, b in found["bits"].items()}
    return Policy(bits, mpq.graph.digest), found["seconds"]


def policy_of(mpq: HubMPQ, row: str, name: str, seed: int, args: argparse.Namespace) -> tuple[Policy, float]:
    """Return (policy, seconds of the search)."""
    level, (strategy, options) = LEVELS[name], ROWS[row]
    began = time.perf_counter()
    if row == "uniform LSQ":
        return Policy.uniform(mpq.graph, level.uniform), 0.0
    if row.startswith("peer"):
        return peers_policy(mpq, row, name, seed, args)
    candidates = {layer.name: level.widths for layer in mpq.graph.searched}
    if row == "random":
        flat = resolve_candidates(mpq.graph, candidates)
        tables = (
            {n: dict.fromkeys(getattr(c, side), 0.0) for n, c in flat.items()} for side in ("weight", "activation")
        )
        mpq.scores = Indicators(*tables)
        target = mpq.usage(level.uniform)[level.limit]
        return random_policy(mpq, level.limit, target, np.random.default_rng(seed)), 0.0
    if strategy == "bsq" and level.limit == "bitops":
        options = {**options, "activation_bits": int(level.uniform[-1])}
    widths = len({*level.widths.weight, *level.widths.activation})
    steps = max(args.search_steps // (widths + 1), 1) if strategy == "limpq" else args.search_steps
    budget: dict[str, Any] = TASKS["resnet20"].budget(name)
    mpq.train_scores(
        cifar_train(seed, args.batch, HELD),
        strategy=strategy,
        strategy_options=options,
        candidates=candidates,
        budget=budget,
        steps=steps,
        seed=seed,
    )
    if row.startswith("reversed"):
        scores = reversed_scores(mpq.score_table()[0])
        result = search_policy(mpq.graph, scores, Budget(**budget), base_bytes=mpq.base_bytes(), strategy="reversed")
    else:
        result = mpq.search(**budget)
    return result.policy, time.perf_counter() - began


def run(row: str, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one row: search, fine-tune from the float weights, measure."""
    task = TASKS["resnet20"]
    mpq = task.build()
    policy, seconds = policy_of(mpq, row, name, seed, args)
    train = cifar_train(seed, args.batch, HELD)
    mpq.apply_policy(policy, train, reestimate_norms=not args.tune_steps)
    if args.tune_steps:
        mpq.finetune(train, steps=args.tune_steps, seed=seed, **task.tune_options)
    test = cifar_test()
    measured = mpq.evaluate(images.loader(Subset(test.dataset, range(args.test)), 500))
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
        "device": device_name(),
        "commit": commit(),
        "policy": {k: str(v) for k, v in policy.bits.items()},
    }


def key(row: str, level: str, seed: int, args: argparse.Namespace) -> str:
    return f"{row}|{level}|{seed}|{settings(args)}"


def settings(args: argparse.Namespace) -> str:
    """Return the settings that the rows of one table share."""
    return f"{args.search_steps}|{args.tune_steps}|{args.batch}|{args.test}"


def report(done: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the Markdown tables of the rows with these settings."""
    lines = [f"{args.search_steps} search steps and {args.tune_steps} fine-tuning steps of {args.batch} images"]
    for name in HERE:
        lines += ["", f"### {name}", "", "| strategy | top-1 | spread | seeds | M BitOps | bytes | search s |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in ROWS:
            found = [done[k] for s in range(SEEDS) if (k := key(row, name, s, args)) in done]
            if found:
                top1 = [r["top1"] for r in found]
                means = [np.mean([r[x] for r in found]) for x in ("bitops", "bytes", "seconds")]
                lines.append(
                    f"| {row} | {np.mean(top1):.2f} | {np.std(top1):.2f} | {len(found)} | {means[0] / 1e6:.1f} "
                    f"| {means[1]:.0f} | {means[2]:.1f} |"
                )
    known = {f"{r['device']} at {r['commit']}" for r in done.values() if r["key"].endswith(settings(args))}
    return "\n".join([*lines, "", "; ".join(sorted(known))])


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Return {key: row} of the rows that record a device."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []
    return {row["key"]: row for row in rows if "device" in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="only rows whose name contains this")
    parser.add_argument("--level", choices=HERE, help="only this budget")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--policies", type=Path, help="file of policies of other packages; missing ones are added")
    parser.add_argument("--search-steps", type=int, default=100)
    parser.add_argument("--tune-steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--test", type=int, default=10000, help="number of test images")
    parser.add_argument("--report", action="store_true", help="print the tables of the finished rows and exit")
    args = parser.parse_args()
    file = images.cache_root() / "strategies.jsonl"
    rounds = [
        (seed, row, name)
        for seed in range(args.seeds)
        for name in HERE
        for row in ROWS
        if args.level in (None, name) and (args.only or "") in row
    ]
    for seed, row, name in () if args.report else rounds:
        if key(row, name, seed, args) in read(file):
            continue
        try:
            found = run(row, name, seed, args)
        except ImportError as error:  # a package that is missing, without a stored policy
            print(f"{name}, {row}, seed {seed}: skipped, {error}", flush=True)
            continue
        with file.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print(f"{name}, {row}, seed {seed}: {found['top1']:.2f} % in {found['seconds']:.1f} s", flush=True)
    print(report(read(file), args))


if __name__ == "__main__":
    main()
