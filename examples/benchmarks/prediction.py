"""Do sums of scores predict measurements? Random policies of equal budget, measured on separate items.

    python examples/benchmarks/prediction.py --net resnet20 --level W2A2
    python examples/benchmarks/prediction.py --net resnet20 --level W2A2 --strategy kl --strategy mse
    python examples/benchmarks/prediction.py --perplexity
    python examples/benchmarks/prediction.py --report

Scores are learned on training data. A refit, as in the search, uses twenty other policies on held-out data. Then
`POLICIES` random policies of two kinds are measured on test items: fills of the budget that do not depend on the
scores, and optima of perturbed scores, which are nearer to what a search compares. Intervals are bootstrapped over
policies and items. --perplexity: SmolLM2 with uniform and mixed bit-widths, weights only. Finished rows are kept in the
cache folder ($HUB_MPQ_CACHE).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import images
import numpy as np
import study
import tasks
import texts

from hub_mpq import Budget, Candidates, HubMPQ, LayerBits, Policy
from hub_mpq.pack import read_indicators, write_indicators
from hub_mpq.search.candidates import resolve_candidates
from hub_mpq.search.held_out import hold_out
from hub_mpq.search.measure import PolicyMeter
from hub_mpq.search.movement import rank_correlation
from hub_mpq.search.prediction import SIGMAS, check_prediction
from hub_mpq.search.scores import score_parts
from hub_mpq.search.space import SearchSpace

POLICIES = 60
WIDTHS = Candidates((2, 3, 4, 5, 6, 7, 8), (32,))  # SmolLM2's


@dataclass(frozen=True)
class Net:
    """A network, its budgets, and three sets of batches that share no item.

    scored: for learning the scores; held: for the refit; tested: for measuring policies.
    """

    build: Callable[[], HubMPQ]
    levels: tuple[str, ...]
    budget: Callable[[str], dict[str, Any]]
    widths: Callable[[str], Candidates]
    scored: Callable[[], Iterable[Any]]
    held: Callable[[], Iterable[Any]]
    tested: Callable[[], Iterable[Any]]
    options: dict[str, Any]


def _of_task(name: str, levels: tuple[str, ...], tested: Callable[[], Iterable[Any]]) -> Net:
    task = tasks.TASKS[name]
    return Net(
        task.build,
        levels,
        task.budget,
        lambda level: task.levels[level].widths,
        lambda: task.train(0),
        task.held,
        tested,
        {"steps": task.indicator_steps, **task.indicator_options},
    )


NETS: dict[str, Net] = {
    "resnet20": _of_task("resnet20", ("W2A2", "W3A3"), lambda: islice(tasks.cifar_test(), 2)),
    "mobilenetv1": _of_task("mobilenetv1", ("W3A3", "W4A4"), lambda: islice(tasks.imagenet_test(), 5)),
    "minilm": _of_task("minilm", ("W2A8", "W3A8"), lambda: texts.held_batches("test")),
    "smollm2": Net(
        texts.smollm2,
        ("4.0", "3.0"),
        lambda level: {"weight_bits": float(level)},
        lambda level: WIDTHS,
        lambda: texts.chunks("valid", 16),
        lambda: texts.chunks("valid", 16, first=16),
        lambda: texts.chunks("test", 4),
        {"steps": 0},
    ),
}


def folder() -> Path:
    """Return the folder of the rows."""
    found = images.cache_root() / "prediction"
    found.mkdir(parents=True, exist_ok=True)
    return found


def distinct(draw: Callable[[np.random.Generator], Policy | None], count: int) -> list[Policy]:
    """Return up to `count` distinct policies."""
    generator = np.random.default_rng(11)
    found: dict[Any, Policy] = {}
    for _ in range(3 * count):
        policy = draw(generator)
        if policy is not None and len(found) < count:
            found.setdefault(tuple(policy.bits.values()), policy)
    return list(found.values())


def scored(name: str, level: str, strategy: str) -> HubMPQ:
    """Return a network with its scores, learned once for all levels of one set of candidates."""
    net = NETS[name]
    mpq, widths = net.build(), net.widths(level)
    mark = "-".join(str(b) for b in (*widths.weight, *widths.activation))
    file = folder() / f"{name}-{strategy}-{mark}.safetensors"
    if not file.exists():
        options = net.options if strategy == "limpq" else {}
        found = mpq.train_scores(net.scored(), strategy=strategy, candidates=widths, seed=0, **options)
        write_indicators(file, found)
    mpq.scores = read_indicators(file)
    return mpq


def run(name: str, level: str, policies: int = POLICIES, strategy: str = "limpq") -> None:
    """Run a row unless it is finished."""
    file = folder() / f"{name}-{level}{'' if strategy == 'limpq' else f'-{strategy}'}.json"
    if file.exists():
        return
    began, net = time.perf_counter(), NETS[name]
    mpq = scored(name, level, strategy)
    scores = mpq.scores
    table, alpha = mpq.score_table()
    graph, base = mpq.graph, mpq.base_bytes()
    space = SearchSpace(graph, table, Budget(**net.budget(level)), base)
    widths = resolve_candidates(graph, net.widths(level))
    calibration = list(islice(net.scored(), 8))
    meter = PolicyMeter(mpq.float_model, graph, widths, calibration, example=mpq.source.example)
    few = hold_out(meter, net.held(), "the held-out batches").few(meter)
    parts = score_parts(scores, table, alpha)
    check = check_prediction(space, meter, few, unit=scores.unit, parts=parts, refit=True)
    refit = None if check is None or check.refit is None else SearchSpace(graph, check.refit, space.budget, base)
    tested = list(net.tested())
    row: dict[str, Any] = {"net": name, "level": level, "strategy": strategy, "unit": scores.unit, "kinds": {}}
    kinds = {
        "fills": space.random,
        "perturbed optima": lambda generator: space.perturbed(generator, float(generator.uniform(*SIGMAS))),
    }
    for kind, draw in kinds.items():
        found = distinct(draw, policies)
        sums, counts = zip(*(meter.measure_samples(policy, tested) for policy in found), strict=True)
        row["kinds"][kind] = {
            "raw": [space.predicted(policy) for policy in found],
            "refit": [(refit or space).predicted(policy) for policy in found],
            "measured": [[round(float(x), 7) for x in one] for one in sums],
            "counts": [float(x) for x in counts[0]],
        }
        print(
            name,
            level,
            strategy,
            kind,
            *figures(row["kinds"][kind], "raw"),
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    row |= {"refitted": refit is not None, "seconds": time.perf_counter() - began, "forwards": meter.forwards}
    study.write(file, row)


def figures(found: dict[str, Any], which: str, rounds: int = 1000) -> tuple[str, str]:
    """Return (Spearman, slope) with 95 % intervals; slope is the median of measured over predicted."""
    predicted, measured = np.array(found[which]), np.array(found["measured"])
    counts, generator = np.array(found["counts"]), np.random.default_rng(0)

    def of(policies: Any, items: Any) -> tuple[float, float]:
        means = measured[policies][:, items].sum(1) / counts[items].sum()
        return rank_correlation(predicted[policies], means), float(np.median(means / predicted[policies]))

    size = measured.shape
    draws = [of(*(generator.integers(n, size=n) for n in size)) for _ in range(rounds)]
    whole, ends = of(*(np.arange(n) for n in size)), np.percentile(draws, [2.5, 97.5], axis=0)
    first, second = (f"{value:.2f} ({low:.2f} … {high:.2f})" for value, low, high in zip(whole, *ends, strict=True))
    return first, second


def perplexity(level: str, others: Path | None = None) -> None:
    """Measure SmolLM2 at a mean bit-width of weights, uniform and mixed: losses of 16 × 256 test tokens.

    others: file of policies of AutoScheme, written by peer.py.
    """
    file = folder() / f"perplexity-{level}.json"
    if file.exists():
        return
    net, tested = NETS["smollm2"], texts.chunks("test", 16)
    mpq, began = scored("smollm2", level, "limpq"), time.perf_counter()
    losses = {"float": texts.token_losses(mpq, tested)}
    results = {"optimum": mpq.search(**net.budget(level))}
    results["measured"] = mpq.search(**net.budget(level), validate=net.held(), validate_seconds=900)
    policies: dict[str, Any] = {"uniform": f"W{float(level):.0f}A32", **results}
    known = json.loads(others.read_text()) if others else {}
    if (name := f"AutoScheme|{level}") in known:
        fixed = {layer.name: layer.fixed for layer in mpq.graph if layer.fixed is not None}
        bits = {layer: LayerBits.parse(b) for layer, b in known[name]["bits"].items()}
        policies["AutoScheme"] = Policy({**bits, **fixed}, mpq.graph.digest)
    for method, policy in policies.items():
        mpq.apply_policy(policy, net.scored())
        losses[method] = texts.token_losses(mpq, tested)
        print(level, method, f"{np.exp(np.mean(losses[method])):.2f}", flush=True)
    told = {"chosen_by": results["measured"].chosen_by, "seconds": time.perf_counter() - began}
    study.write(file, {"level": level, "losses": losses, **told})


def report() -> None:
    """Print the tables of the finished rows in Markdown."""
    head = [
        "network",
        "level",
        "strategy",
        "policies",
        "items",
        "Spearman",
        "slope",
        "Spearman, refitted",
        "slope, refitted",
    ]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for file in sorted(folder().glob("*.json")):
        row = json.loads(file.read_text())
        for kind, found in row.get("kinds", {}).items():
            shape = np.shape(found["measured"])
            cells = [row["net"], row["level"], row["strategy"], f"{shape[0]} {kind}", f"{sum(found['counts']):.0f}"]
            kept = figures(found, "refit") if row["refitted"] else ("not kept", "")
            print("| " + " | ".join([*cells, *figures(found, "raw"), *kept]) + " |")
    head = ["SmolLM2, mean bits", "policy", "perplexity", "loss minus uniform's, 95 %"]
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for file in sorted(folder().glob("perplexity-*.json")):
        row = json.loads(file.read_text())
        for method, losses in row["losses"].items():
            own = method + (f" (chosen: {row['chosen_by']})" if method == "measured" else "")
            apart = "" if method == "uniform" else paired(losses, row["losses"]["uniform"])
            print(f"| {row['level']} | {own} | {np.exp(np.mean(losses)):.2f} | {apart} |")


def paired(a: list[float], b: list[float], chunk: int = 255, rounds: int = 2000) -> str:
    """Return the 95 % interval of the mean of a − b over resampled chunks, whose tokens are not independent."""
    means = (np.array(a) - np.array(b)).reshape(-1, chunk).mean(1)
    draws = np.random.default_rng(0).choice(means, (rounds, len(means))).mean(1)
    return "{:+.3f} … {:+.3f}".format(*np.percentile(draws, [2.5, 97.5]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(NETS), action="append")
    parser.add_argument("--level", action="append")
    parser.add_argument("--strategy", choices=("limpq", "gradient", "hessian", "mse", "kl"), action="append")
    parser.add_argument("--policies", type=int, default=POLICIES, help="number of policies of each kind")
    parser.add_argument("--perplexity", action="store_true", help="SmolLM2 instead of the other networks")
    parser.add_argument("--policies-file", type=Path, help="policies of AutoScheme, written by peer.py")
    parser.add_argument("--report", action="store_true", help="print the tables of the finished rows and exit")
    args = parser.parse_args()
    if args.perplexity:
        for level in args.level or NETS["smollm2"].levels:
            perplexity(level, args.policies_file)
    elif not args.report:
        for name in args.net or NETS:
            for level in args.level or NETS[name].levels:
                for strategy in args.strategy or ("limpq",):
                    run(name, level, args.policies, strategy)
    report()


if __name__ == "__main__":
    main()
