"""Check that a pulled model gives the same results on every runtime.

    python examples/benchmarks/runtimes.py
    python examples/benchmarks/runtimes.py --model resnet20

A mixed policy (scores by "gradient", calibrated, not fine-tuned) is certified on each installed runtime, published to
the Hub stand-in on loopback, and pulled and measured on each in a fresh process: MobileNetV1 at the BitOps of W4A4
(top-1 on 800 images of ImageNet), ResNet-20 at those of W4A4 (top-1 on the test images of CIFAR-10), MiniLM at the
bytes of W4A8 (Spearman on the STS-B test pairs). For images the table shows how many only the runtime, and only the
reference, classifies correctly, and how many are correct on one of runtime and float64 only.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import warnings
from itertools import islice
from typing import Any

import hub
from torch import Tensor, nn

LEVELS = {"mobilenetv1": "W4A4", "resnet20": "W4A4", "minilm": "W4A8"}

_PULL = """
import json, sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, sys.argv[1])
import tasks, torch
from hub_mpq import HubMPQ

torch.set_num_threads(1)
task = tasks.TASKS[sys.argv[2]]
net = {} if sys.argv[2] == "minilm" else {"module": task.build().model}
mpq = HubMPQ.from_pretrained(f"me/{sys.argv[2]}", runtime=sys.argv[3], **net)
layers = mpq.model.runtime_layers
items, figure = task.measure(mpq)
print(json.dumps([items, figure, len(layers.integer), len(layers.float)]))
"""


class InFloat64(nn.Module):
    """A network for images in float64, where the order of sums does not change the codes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).double().eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x.double())
        return out


def run(name: str) -> list[list[Any]]:
    """Return the rows of one model: runtime, integer layers, certificate, result of the pulled model, reference."""
    import tasks

    from hub_mpq.core import runtimes

    task = tasks.TASKS[name]
    level = task.levels[LEVELS[name]]
    mpq = task.build()
    train = list(islice(task.train(0), 16))
    mpq.train_scores(train, strategy="gradient", candidates=level.widths)
    mpq.apply_policy(mpq.search(**task.budget(LEVELS[name])).policy, train)
    own, reference = task.measure(mpq)
    double = task.measure(InFloat64(mpq.model))[0] if isinstance(own[0], float) else None
    if double is not None:
        sum64 = f"{sum(double) / len(double):.2f}"
        print(
            f"| {name} | torch in float64 | | | | | {sum64} | {reference:.2f} | {_changed(double, own)} | 0 |",
            flush=True,
        )
    held = list(islice(task.held(), 4))
    rows = []
    names = [runtime.name for runtime in runtimes if runtime.available() is None]
    for runtime in names:
        found = mpq.certify(mpq.to_runtime(runtime), held)
        rows.append([runtime, found])
    mpq.push_to_hub(f"me/{name}", token="token", float_copy=False)
    out = []
    with tempfile.TemporaryDirectory() as home:
        for runtime, found in rows:
            done = subprocess.run(
                [sys.executable, "-c", _PULL, str(hub.HERE), name, runtime],
                env={**os.environ, "HF_HOME": home, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{name} on {runtime}: {done.stderr[-2000:]}")
            items, figure, integer, floats = json.loads(done.stdout.splitlines()[-1])
            whole = found.total
            share = whole.flips / whole.codes if whole.codes else 0.0
            verdict = "yes" if found.exact else found.reasons[0]
            out.append([name, runtime, f"{integer} of {integer + floats}", f"{whole.error:.1e}", f"{share:.1e}"])
            out[-1] += [verdict, f"{figure:.2f}", f"{reference:.2f}", _changed(items, own)]
            out[-1].append("" if double is None else str(sum(a != b for a, b in zip(items, double, strict=True))))
            print("| " + " | ".join(map(str, out[-1])) + " |", flush=True)
    return out


def _changed(items: list[Any], own: list[Any]) -> str:
    """Count the items that only the pulled model, and only the reference, gets right; "" where not applicable."""
    if not isinstance(own[0], float):
        return ""
    pairs = list(zip(items, own, strict=True))
    return f"{sum(a > b for a, b in pairs)}, {sum(a < b for a, b in pairs)} of {len(pairs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=LEVELS, action="append", help="default: all")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    head = ["model", "runtime", "integer layers", "largest error", "codes off by one", "certified"]
    head += ["pulled model", "reference", "images gained, lost", "answers unlike float64"]
    with hub.loopback():
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for name in args.model or LEVELS:
            run(name)


if __name__ == "__main__":
    main()
