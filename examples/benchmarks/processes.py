"""ResNet-20 on CIFAR-10 in one process, and in two that are killed and resumed.

    python examples/benchmarks/processes.py --steps 8 --tune 8

Indicators, search at W3A3, fine-tuning, test accuracy. Both see the same samples per step: 128 in one process, 64 in
each of two.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH, SEED, LEVEL = 128, 0, "W3A3"


def worker(folder: Path, steps: int, tune: int) -> None:
    """Run the route as one of the launched processes."""
    import images
    import tasks
    import torch

    from hub_mpq import HubMPQ
    from hub_mpq.train.processes import describe, world

    device = describe()
    rank, processes = world()
    net = tasks.lifted_resnet20()
    mpq = HubMPQ.from_module(
        net, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), model_id="resnet20"
    )
    # no augmentation: its random draws would depend on how the samples are distributed
    data = images.Images(*images.cifar10("train"), images.CIFAR_MEAN, images.CIFAR_STD)
    train = images.loader(data, BATCH // processes, seed=SEED)
    test = tasks.cifar_test()
    states: dict[str, Any] = {"checkpoint_every": 2, "resume": True, "seed": SEED}
    learned = mpq.train_indicators(train, steps=steps, checkpoint_dir=folder / "indicators", **states)
    result = mpq.search(bitops=LEVEL)
    float_figures = mpq.evaluate(test)
    mpq.apply_policy(result.policy, train, reestimate_norms=False)
    log = mpq.finetune(train, steps=tune, lr=1e-3, scale_lr=3e-3, checkpoint_dir=folder / "tuned", **states)
    figures = mpq.evaluate(test)
    if rank == 0:
        out = {
            "device": device,
            "float": float_figures["top1"],
            "top1": figures["top1"],
            "samples": figures["samples"],
            "indicators": {"weight": learned.weight, "activation": learned.activation},
            "step_seconds": {"joint": learned.provenance["step_seconds"], "tuned": log.step_seconds},
            "trained": learned.provenance["samples"],
            "loss": learned.provenance["epoch_loss"],
            "bits": {name: str(bits) for name, bits in result.policy.bits.items()},
        }
        (folder / "result.json").write_text(json.dumps(out))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(folder: Path, processes: int, steps: int, tune: int) -> subprocess.Popen[bytes]:
    """Start the worker on a number of processes with Accelerate's launcher."""
    from hub_mpq.cli.launch import arguments

    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "accelerate.commands.launch", *arguments(processes)]
    command = [*launcher, __file__, "--worker", str(folder), "--steps", str(steps), "--tune", str(tune)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def kill(process: subprocess.Popen[bytes], folder: Path, step: int) -> str:
    """Send SIGKILL to launcher and workers once a state of `step` exists; return the name of the newest state."""
    states = folder / "indicators"
    while process.poll() is None and not any(int(p.name[-8:]) >= step for p in states.glob("step-*")):
        time.sleep(0.01)
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    return max(p.name for p in states.glob("step-*"))


def compare(one: dict[str, Any], two: dict[str, Any], side: str) -> tuple[float, float]:
    """Return (rank correlation over layers, mean over bit-widths; median relative difference) of the indicators."""
    from hub_mpq.search.movement import rank_correlation

    a, b = one["indicators"][side], two["indicators"][side]
    widths = sorted({bits for row in a.values() for bits in row})
    rho = [rank_correlation(*(np.array([t[name][bits] for name in a]) for t in (a, b))) for bits in widths]
    apart = [abs(b[name][bits] / a[name][bits] - 1) for name in a for bits in a[name]]
    return float(np.mean(rho)), float(np.median(apart))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=12, help="joint steps")
    parser.add_argument("--tune", type=int, default=16, help="fine-tuning steps")
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.steps, given.tune)
        return
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        for processes in (1, 2):
            folder = Path(root) / str(processes)
            folder.mkdir()
            began = time.perf_counter()
            running = start(folder, processes, given.steps, given.tune)
            if processes > 1:
                last = kill(running, folder, given.steps // 2)
                print(f"killed with SIGKILL; resuming from {last}", flush=True)
                running = start(folder, processes, given.steps, given.tune)
            if running.wait() != 0:
                raise SystemExit("the worker failed")
            found[processes] = json.loads((folder / "result.json").read_text())
            found[processes]["seconds"] = time.perf_counter() - began
    print("| processes | top-1 float | top-1 mixed | samples trained on | loss | joint step s | run s |")
    print("|---|---|---|---|---|---|---|")
    for processes, row in found.items():
        steps = row["step_seconds"]["joint"]
        cells = [f"{row['float']:.2f}", f"{row['top1']:.2f}", row["trained"], f"{row['loss'][-1]:.4f}", f"{steps:.3f}"]
        print(f"| {processes} ({row['device']}) | {' | '.join(map(str, cells))} | {row['seconds']:.0f} |")
    for side in ("weight", "activation"):
        rho, apart = compare(found[1], found[2], side)
        print(f"{side} indicators, two and one: rank correlation {rho:.4f}, median difference {100 * apart:.2f} %")
    bits = [row["bits"] for row in found.values()]
    same = sum(bits[0][name] == bits[1][name] for name in bits[0])
    print(f"policies: {same} of {len(bits[0])} layers have the same bit-widths; {found[1]['samples']:.0f} test images")


if __name__ == "__main__":
    main()
