"""Cost of quantization during training: time and memory over the float network, and scaling to two processes.

    python examples/benchmarks/train.py passes --model resnet18             # one pass, against other formulas
    python examples/benchmarks/train.py passes --model resnet18 --batch 4 --size 64 --rounds 30
    python examples/benchmarks/train.py passes --model bert --layers 2      # 2 of BERT-base's 12 equal layers
    python examples/benchmarks/train.py step --model resnet18               # a joint step over n + 1 float passes
    python examples/benchmarks/train.py memory --model resnet18             # peak memory of a step, fresh processes
    python examples/benchmarks/train.py processes --batch 8                 # images/s of two processes over one

Weights are random: only time and memory are measured. One thread per process. All contestants take turns, in a new
order each round, and ratios are taken within a round, so that load on the machine affects all sides. Figures are
medians and ranges over rounds, of wall time and of the CPU time of the process, which other work on the machine
disturbs less. "least": the least wall time of a contestant over the least of float. All layers that a search would
quantize have 4-bit weights and inputs, one scale per tensor (`--per-channel` for hub_mpq's weights, as its default
indicator trains them); stem, head and embeddings are float, as in joint training. formula: the straight-through formula
in plain torch operations, as in the code of LIMPQ's authors. torch: torch's learnable fake-quantize operation. Both
differ from hub_mpq only in the quantizer.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from hub_mpq import HubMPQ
from hub_mpq.adapters.trace import norm_of
from hub_mpq.core import Candidates
from hub_mpq.nn.calibrate import sample_inputs
from hub_mpq.quantizers import LSQ, compile_quantizers
from hub_mpq.search.limpq import LIMPQ
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune, fit, forward

CONTESTANTS = ("float", "formula", "torch", "hub_mpq", "compiled")
BITS = 4


class Formula(nn.Module):
    """LSQ as operations of autograd: q = s·(c + (round(c) − c).detach()), c = clamp(x/s), gradient of s times g."""

    def __init__(self, lsq: LSQ) -> None:
        super().__init__()
        self.scale = nn.Parameter(lsq.scale.detach().clone())
        spec, z = lsq.spec, lsq.zero_point
        assert spec is not None
        self.low, self.high, self.signed = spec.qmin - z, spec.qmax - z, lsq.signed

    def factor(self, x: Tensor) -> float:
        return 1 / math.sqrt((x.numel() if self.signed else x[0].numel()) * max(-self.low, self.high))

    def forward(self, x: Tensor) -> Tensor:
        g = self.factor(x)
        s = (self.scale - self.scale * g).detach() + self.scale * g
        c = torch.clamp(x / s, self.low, self.high)
        return ((c.round() - c).detach() + c) * s


class TorchOp(Formula):
    """Torch's learnable fake-quantize operation."""

    def forward(self, x: Tensor) -> Tensor:
        quantize = torch._fake_quantize_learnable_per_tensor_affine
        return quantize(x, self.scale, x.new_zeros(1), self.low, self.high, self.factor(x))


def network(options: argparse.Namespace) -> tuple[HubMPQ, Any]:
    """Return (model with its graph, one batch)."""
    torch.manual_seed(0)
    if options.model == "bert":
        config = BertConfig(num_hidden_layers=options.layers, num_labels=2)
        ids = torch.randint(0, config.vocab_size, (options.batch, options.size))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
        example = {k: v[:1] for k, v in batch.items() if k != "labels"}
        return HubMPQ.from_module(BertForSequenceClassification(config), example), batch
    images = torch.randn(options.batch, 3, options.size, options.size)
    net = timm.create_model(options.model)
    return HubMPQ.from_module(net, images[:1]), (images, torch.randint(0, 1000, (options.batch,)))


def joint(mpq: HubMPQ, batch: Any, widths: Sequence[int], per_channel: bool) -> tuple[nn.Module, LIMPQ]:
    """Return a model at the start of joint training, at 4 bits, and its strategy."""
    model = copy.deepcopy(mpq.float_model)
    loss = Finetune(task=Classification(), lr=1e-4, scale_lr=1e-2, weight_decay=0.0, smoothing=0.1)
    strategy = LIMPQ(indicator="divergence" if per_channel else "raw scale")
    strategy.loss = loss
    small = cut(batch, 2)
    candidates = {layer.name: Candidates(tuple(widths), tuple(widths)) for layer in mpq.graph.searched}
    with torch.no_grad():
        norms = norm_of(model, mpq.source.example)
    strategy.attach(model, mpq.graph, candidates, norms)
    strategy.calibrate(model, [small], sample_inputs(model, [small], forward))
    strategy.set_widths(model.train(), dict.fromkeys(strategy.layers, BITS))
    return model, strategy


def cut(batch: Any, count: int) -> Any:
    return {k: v[:count] for k, v in batch.items()} if isinstance(batch, dict) else tuple(v[:count] for v in batch)


def contestant(name: str, mpq: HubMPQ, batch: Any, options: argparse.Namespace) -> nn.Module | None:
    """Return the network with the quantizers of one contestant; None where it cannot run."""
    if name == "float":
        return copy.deepcopy(mpq.float_model).train()
    per_channel = options.per_channel and name in ("hub_mpq", "compiled")
    model, strategy = joint(mpq, batch, (BITS,), per_channel)
    if name == "compiled" and not compile_quantizers(model):
        return None
    if peer := {"formula": Formula, "torch": TorchOp}.get(name):
        for module in strategy.layers.values():
            for which in ("weight_quantizer", "input_quantizer"):
                setattr(module, which, peer(getattr(module, which)))
    return model


def one_pass(model: nn.Module, batch: Any) -> None:
    out = forward(model, batch, labels=True)
    (out.loss if isinstance(batch, dict) else F.cross_entropy(out, batch[1])).backward()


def rounds(runs: dict[str, Callable[[Any], None]], batch: Any, count: int) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, CPU) seconds of every contestant in every round, after one run on two samples."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run(cut(batch, 2))
    for i in range(count):
        order = list(runs)
        random.Random(i).shuffle(order)
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name](batch)
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(found: dict[str, list[tuple[float, float]]]) -> None:
    """Print ratios to float in the same round."""
    print("| | s wall | over float, wall | over float, CPU | least |\n|---|---|---|---|---|")
    least = min(found["float"])[0]
    for name, seconds in found.items():
        wall, cpu = ([a[i] / b[i] for a, b in zip(seconds, found["float"], strict=True)] for i in (0, 1))
        seen = spread([s[0] for s in seconds], 3)
        print(f"| {name} | {seen} | {spread(wall)} | {spread(cpu)} | {min(seconds)[0] / least:.2f} |")


def passes(options: argparse.Namespace) -> None:
    mpq, batch = network(options)
    models = {name: contestant(name, mpq, batch, options) for name in options.contestants}

    def run(model: nn.Module, batch: Any) -> None:
        one_pass(model, batch)
        model.zero_grad(set_to_none=True)

    runs = {name: partial(run, model) for name, model in models.items() if model is not None}
    table(rounds(runs, batch, options.rounds))


def joint_step(model: nn.Module, strategy: LIMPQ, opt: torch.optim.Optimizer, batch: Any) -> None:
    """Do one step as hub_mpq.train.fit does."""
    for loss, _ in strategy.losses(model, batch, random.Random(0)):
        loss.backward()
    torch.nn.utils.clip_grad_value_([p for p in model.parameters() if p.grad is not None], 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)


def step(options: argparse.Namespace) -> None:
    """Compare a joint step, optimizer included, with as many float passes without an optimizer."""
    mpq, batch = network(options)
    plain = copy.deepcopy(mpq.float_model).train()

    def floats(batch: Any) -> None:
        for _ in range(len(options.widths) + 1):
            one_pass(plain, batch)
            plain.zero_grad(set_to_none=True)

    runs: dict[str, Callable[[Any], None]] = {"float": floats}
    for name in [c for c in options.contestants if c in ("hub_mpq", "compiled")]:
        model, strategy = joint(mpq, batch, options.widths, per_channel=True)
        if name == "compiled" and not compile_quantizers(model):
            continue
        opt = torch.optim.AdamW(strategy.parameter_groups(model), weight_decay=0.0)
        runs[name] = partial(joint_step, model, strategy, opt)
    table(rounds(runs, batch, options.rounds))


def resident(key: str) -> int:
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))


def peak(run: Callable[[], None]) -> int:
    """Return the KiB of resident memory that a run adds at its peak (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory first
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def memory(options: argparse.Namespace) -> None:
    """Measure the peak over the memory before the step: activations, gradients, temporaries. Fresh processes."""
    if options.child:
        mpq, batch = network(options)
        model = contestant(options.child, mpq, batch, options)
        if model is not None:
            one_pass(model, cut(batch, 2))  # load libraries and compile kernels
            model.zero_grad(set_to_none=True)
            print(peak(lambda: one_pass(model, batch)))
        return
    found: dict[str, list[int]] = {}
    for name in list(options.contestants) * options.rounds:
        out = subprocess.run([*sys.orig_argv, "--child", name], stdout=subprocess.PIPE, text=True, check=True)
        if out.stdout.strip():
            found.setdefault(name, []).append(int(out.stdout.splitlines()[-1]))
    print("| | MiB at the peak of a pass | over float |\n|---|---|---|")
    for name, kib in found.items():
        ratio = spread([a / b for a, b in zip(kib, found["float"], strict=True)])
        print(f"| {name} | {spread([k / 1024 for k in kib], 0)} | {ratio} |")


def launched(count: int, port: int) -> list[str]:
    """Return the output of `count` processes that train together."""
    common = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    common |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} if count > 1 else {} for r in range(count)]
    command = [*sys.orig_argv, "--child", "fit"]
    runs = [subprocess.Popen(command, env=common | rank, stdout=subprocess.PIPE, text=True) for rank in ranks]
    printed = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        raise SystemExit("a process failed")
    return printed


def processes(options: argparse.Namespace) -> None:
    """Measure images/s of joint training by `fit` over gloo, by the median step and by the CPU-seconds of all steps.

    The latter is what as many free cores would give without waiting.
    """
    if options.child:
        mpq, batch = network(options)
        model, strategy = joint(mpq, batch, options.widths, per_channel=True)
        began = time.process_time()
        log = fit(model, strategy, [batch] * 16, steps=options.steps)
        print(json.dumps([log.step_seconds, (time.process_time() - began) / options.steps]))
        return
    rates: dict[int, list[list[float]]] = {1: [], 2: []}
    for i in range(options.rounds):
        for count in rates:
            seconds = [json.loads(out.splitlines()[-1]) for out in launched(count, 29600 + os.getpid() % 300 + i)]
            rates[count].append([count * options.batch / max(each) for each in zip(*seconds, strict=True)])
    print("| processes | images/s | over one | images a CPU second | over one |\n|---|---|---|---|---|")
    for count, values in rates.items():
        wall, cpu = ([a[i] / b[i] for a, b in zip(values, rates[1], strict=True)] for i in (0, 1))
        rate, each = (spread([v[i] for v in values]) for i in (0, 1))
        print(f"| {count} | {rate} | {spread(wall)} | {each} | {spread(cpu)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("passes", "step", "memory", "processes"))
    parser.add_argument("--model", default="resnet18", help="a timm name, or bert")
    parser.add_argument("--layers", type=int, default=12, help="layers of BERT")
    parser.add_argument("--batch", type=int, default=32, help="default: 32")
    parser.add_argument("--size", type=int, help="pixels (224), or tokens of BERT (128)")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 6], help="candidate bit-widths of a joint step")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--steps", type=int, default=4, help="steps of `processes`")
    parser.add_argument("--per-channel", action="store_true", help="one weight scale per channel for hub_mpq")
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = options.size or (128 if options.model == "bert" else 224)
    torch.set_num_threads(1)
    {"passes": passes, "step": step, "memory": memory, "processes": processes}[options.part](options)
    print(f"load at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)


if __name__ == "__main__":
    main()
