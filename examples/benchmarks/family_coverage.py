"""How much of each family of models is quantized, and whether it survives a round trip.

    python examples/benchmarks/family_coverage.py timm
    python examples/benchmarks/family_coverage.py transformers --round-trip
    python examples/benchmarks/family_coverage.py transformers llava qwen2_audio --rows rows.jsonl

One row per family: the smallest model of each of timm's files, types of transformers with their default config, or
NAMES. Counted on meta tensors, without weights or network. "MACs": share of the multiply-accumulates with a weight that
are in quantized layers. "weights": share of the elements of all Parameters, including biases and norms. "ratio": all
counted MACs, including products of activations, over those of torch.utils.flop_counter (empty where it cannot run the
model). "largest float": the largest part that stays float, by MACs, else by weights. With --round-trip a tiny model
with random weights is quantized to a mix of W4A8 and W3A4, saved and loaded: "loaded" by HubMPQ.from_pretrained, "auto"
by transformers, both with bit-identical outputs.

Each model runs in a separate process with a time limit, and its row is written to --rows at once, so a second call
continues where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coverage_models import TYPES, all_types, class_of, config_of, cut, smallest, timm_modules, tiny

Row = dict[str, Any]
MEMORY = 12 * 2**30
"""Bytes of address space that one model may take beyond the empty process."""
BUSY = 10
LARGEST = 160_000_000
"""Most Parameters of a model that the round trip builds with weights."""


def isolated(work: Callable[..., Row], *args: Any, limit: float) -> Row:
    """Run `work` in a separate process; {"error": …} where it raises, dies or exceeds the limit.

    Args:
        work: Returns a row.
        *args: Its arguments.
        limit: Seconds of CPU time. The limit on wall time is `BUSY` times as long, for a busy machine.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, work, args, limit))
    process.start()
    there.close()
    try:
        row: Row = here.recv() if here.poll(limit * BUSY) else {"error": f"longer than {limit * BUSY:.0f} s"}
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        row = {"error": f"longer than {limit:.0f} s of CPU time" if late else "the process died"}
    process.kill()
    process.join()
    return row


def _answer(pipe: Any, work: Callable[..., Row], args: tuple[Any, ...], limit: float) -> None:
    spent = math.ceil(time.process_time() + limit)
    resource.setrlimit(resource.RLIMIT_CPU, (spent, spent + 1))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    try:
        row = work(*args)
    except BaseException as error:
        row = failure(error)
    pipe.send(row)


def failure(error: BaseException) -> Row:
    """Describe an error in one line, with the last frames of it and of its cause."""
    places, cause = [], error
    while cause is not None and len(places) < 3:
        frames = traceback.extract_tb(cause.__traceback__)[-3:]
        places.append([f"{type(cause).__name__}: {str(cause)[:200]}"])
        places[-1] += [f"{frame.filename.partition('site-packages/')[2]}:{frame.lineno}" for frame in frames]
        cause = cause.__cause__ or cause.__context__
    return {"error": f"{type(error).__name__}: {str(error)[:400]}", "places": places}


def counted(source: Any) -> Row:
    """Return the shares of MACs and of Parameters in quantized layers, and what the rest is."""
    graph, model = source.graph, source.model
    products = ("attention", "matmul")
    floats = [op for op in graph.floats if op.kind not in products]
    inside, outside = sum(layer.macs for layer in graph), sum(op.macs for op in floats)
    weights = sum(layer.weight_count for layer in graph if layer.weight_owner is None)
    by_macs: dict[str, int] = {}
    by_weights: dict[str, int] = {}
    for op in floats:
        key = f"{op.kind}: {op.reason}"
        by_macs[key] = by_macs.get(key, 0) + op.macs
        by_weights[key] = by_weights.get(key, 0) + op.weight_count
    parameters = sum(p.numel() for p in model.parameters())
    by_weights["Parameters of no layer (norms, biases, positions)"] = parameters - weights - sum(by_weights.values())

    def shares(amounts: dict[str, int], total: int) -> list[tuple[str, float]]:
        ordered = sorted(amounts.items(), key=lambda x: -x[1])[:3]
        return [(key, round(amount / total, 4)) for key, amount in ordered if amount > 0 and total]

    return {
        "class": type(model).__name__,
        "inputs": {k: list(v.shape) for k, v in _named(source.example).items() if hasattr(v, "shape")},
        "layers": len(graph),
        "macs": inside + sum(op.macs for op in graph.floats),
        "mac_share": inside / (inside + outside) if inside + outside else 0.0,
        "parameters": parameters,
        "weight_share": weights / parameters,
        "float_macs": shares(by_macs, inside + outside),
        "float_weights": shares(by_weights, parameters),
    }


def _named(example: Any) -> dict[str, Any]:
    return dict(example) if isinstance(example, dict) else {str(i): x for i, x in enumerate(example)}


def reference(model: Any, example: Any) -> float:
    """Return the MACs of one forward by torch's counter, with attention as two products."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from hub_mpq.adapters.example_inputs import example_for
    from hub_mpq.adapters.forward import call, output_on_zeros

    if hasattr(model, "main_input_name"):  # with values, which meta tensors lack
        example = example_for(model)
    errors = []
    for run in (call, output_on_zeros):  # the second where the forward looks at values
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
                run(model.eval().requires_grad_(False), example)
            return counter.get_total_flops() / 2
        except Exception as error:  # a model may raise anything on meta tensors
            errors.append(error)
    raise errors[-1]


def coverage(model_id: str) -> Row:
    """Return the row of a timm name, or of a folder with a config."""
    from hub_mpq import HubMPQ, adapters

    began = time.process_time()
    source = adapters.load(model_id, pretrained=False, meta=True)
    HubMPQ(source).report()
    row = {**counted(source), "seconds": round(time.process_time() - began, 2)}
    try:
        row["reference"] = reference(source.model, source.example)
    except Exception as error:  # a model may raise anything on meta tensors
        row["no_reference"] = f"{type(error).__name__}: {str(error)[:100]}"
    return row


def of_module(module: str) -> Row:
    """Return the row of the smallest model of one of timm's files."""
    name = smallest(timm_modules()[module])
    return {"model": name, **coverage(name)}


def of_type(model_type: str) -> Row:
    """Return the row of a type of transformers."""
    config = config_of(model_type)
    config.architectures = [class_of(model_type)]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return coverage(folder)


def mixed(graph: Any) -> Any:
    """Return a policy with every other layer at W4A8 and the rest at W3A4, as far as ties allow."""
    from hub_mpq import Policy
    from hub_mpq.core import LayerBits

    levels = LayerBits.parse("W4A8"), LayerBits.parse("W3A4")
    weight: dict[str, int] = {}
    activation: dict[str, int] = {}
    bits = {}
    for i, layer in enumerate(graph):
        level = levels[i % 2]
        w = weight.setdefault(layer.tie or layer.name, level.weight)
        a = activation.setdefault(layer.activation_tie or layer.name, level.activation)
        bits[layer.name] = layer.fixed or LayerBits(w, 32 if layer.weight_only else a)
    return Policy(bits, graph.digest)


def outputs(model: Any, example: Any) -> list[Any]:
    """Return all tensors of one forward with one seed."""
    import random

    import numpy as np
    import torch
    from torch.utils._pytree import tree_leaves

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(*example)
    return [x for x in tree_leaves(dict(out) if isinstance(out, dict) else out) if isinstance(x, torch.Tensor)]


def equal(one: list[Any], other: list[Any]) -> bool:
    """Tell whether two lists of tensors hold the same values, with NaN at the same places."""
    return len(one) == len(other) and all(
        x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in zip(one, other, strict=True)
    )


def round_trip(mpq: Any, folder: Path, auto_class: Any) -> Row:
    """Quantize, save, and load by hub_mpq and by transformers."""
    from hub_mpq import HubMPQ

    example = mpq.source.example
    mpq.apply_policy(mixed(mpq.graph))
    before = outputs(mpq.model, example)
    mpq.save_pretrained(folder)
    loaded = HubMPQ.from_pretrained(folder)
    row = {"loaded": equal(before, outputs(loaded.model, example))}
    if auto_class is not None:
        row["auto"] = equal(before, outputs(auto_class.from_pretrained(folder).eval(), example))
    return row


def round_trip_of_type(model_type: str) -> Row:
    """Round trip of a tiny model of a type of transformers; where the small sizes do not fit, of one of two layers."""
    import torch
    import transformers

    from hub_mpq import HubMPQ

    cls = getattr(transformers, class_of(model_type))
    row: Row = {}
    for small in (tiny, cut):
        with tempfile.TemporaryDirectory() as folder:
            try:
                config = small(config_of(model_type))
                with torch.device("meta"):
                    size = sum(p.numel() for p in cls._from_config(config).parameters())
                if size > LARGEST:
                    raise ValueError(f"{size / 1e6:.0f} M parameters are too many for a round trip")
                torch.manual_seed(0)
                cls._from_config(config, dtype=torch.float32).save_pretrained(f"{folder}/float")
                mpq = HubMPQ.from_pretrained(f"{folder}/float", sequence_length=48)
                outputs(mpq.model, mpq.source.example)
            except Exception as error:  # the small sizes do not fit each other
                row = row or failure(error)
                continue
            return round_trip(mpq, Path(folder) / "packed", cls)
    return row


def round_trip_of_name(name: str) -> Row:
    """Round trip of a timm model with random weights, at the smallest of a few input sizes that it takes."""
    import torch
    from transformers import AutoModelForImageClassification

    from hub_mpq import HubMPQ

    row: Row = {}
    for kwargs in ({"input_size": (3, 64, 64)}, {"img_size": 64}, {"input_size": (3, 128, 128)}, {}):
        try:
            torch.manual_seed(0)
            mpq = HubMPQ.from_pretrained(name, pretrained=False, **kwargs)
            outputs(mpq.model, mpq.source.example)
        except Exception as error:  # not every model takes every size
            row = row or failure(error)
            continue
        auto = AutoModelForImageClassification if mpq.source.config.get("num_classes") else None
        with tempfile.TemporaryDirectory() as folder:
            return round_trip(mpq, Path(folder), auto)
    return row


def table(rows: dict[str, Row], trips: dict[str, Row]) -> str:
    """Return the Markdown table, least covered first."""

    def share(row: Row, key: str) -> str:
        return f"{row[key]:.1%}" if key in row else ""

    def yes(row: Row, key: str) -> str:
        return "" if not row else ("yes" if row.get(key) else "no" if key in row else row.get("error", "")[:60])

    lines = ["| family | class | MACs | weights | ratio | largest float |" + (" loaded | auto |" if trips else "")]
    lines.append("|---" * (8 if trips else 6) + "|")
    for name in sorted(rows, key=lambda n: min(rows[n].get("mac_share", 0), rows[n].get("weight_share", 0))):
        row, trip = rows[name], trips.get(name, {})
        ratio = f"{row['macs'] / row['reference']:.4f}" if row.get("reference") else ""
        rest = [x for x in row.get("float_macs", []) + row.get("float_weights", []) if x[1] >= 0.01]
        why = f"{rest[0][0]} ({rest[0][1]:.1%})" if rest else row.get("error", "")[:160]
        label = f"{name} ({row['model']})" if "model" in row else name
        cells = [label, row.get("class", ""), share(row, "mac_share"), share(row, "weight_share"), ratio, why]
        cells += [yes(trip, "loaded"), yes(trip, "auto")] if trips else []
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    for key, what in (("mac_share", "MACs"), ("weight_share", "weights")):
        enough = sum(row.get(key, 0) >= 0.95 for row in rows.values())
        lines.append(f"\nAt least 95 % of the {what}: {enough} of {len(rows)}.")
    if trips:
        for key in ("loaded", "auto"):
            same = sum(trip.get(key) is True for trip in trips.values())
            lines.append(f"\n{key}, bit-identical: {same} of {len(trips)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["timm", "transformers"])
    parser.add_argument("names", nargs="*", help="timm names or types of transformers instead of the default list")
    parser.add_argument("--all", action="store_true", help="all types of transformers that have a task")
    parser.add_argument("--round-trip", action="store_true", help="also quantize, save and load a tiny model")
    parser.add_argument("--limit", type=float, default=60, help="seconds of CPU time per model")
    parser.add_argument("--rows", type=Path, help="JSON lines file of finished rows, which are not run again")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import timm  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import hub_mpq.hub.plugin
    import hub_mpq.search.policy_search  # noqa: F401

    torch.set_num_threads(1)
    kept: dict[tuple[str, str], Row] = {}
    if args.rows and args.rows.is_file():
        found = [json.loads(line) for line in args.rows.read_text().splitlines()]
        kept = {(row["name"], row["what"]): row for row in found}
    if args.library == "timm":
        work: Callable[..., Row] = coverage if args.names else of_module
        names = args.names or sorted(timm_modules())
    else:
        work, names = of_type, args.names or (all_types() if args.all else TYPES)

    def of(name: str, what: str, do: Callable[[], Row]) -> Row:
        if (name, what) not in kept:
            row = {"name": name, "what": what, **do()}
            kept[name, what] = row
            if args.rows:
                with args.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        return kept[name, what]

    rows, trips = {}, {}
    for name in names:
        rows[name] = of(name, "coverage", lambda name=name: isolated(work, name, limit=args.limit))
        if args.round_trip:
            model = rows[name].get("model", name)
            trip = round_trip_of_name if args.library == "timm" else round_trip_of_type
            trips[name] = of(name, "round trip", lambda m=model, t=trip: isolated(t, m, limit=args.limit))
    print(table(rows, trips))


if __name__ == "__main__":
    main()
