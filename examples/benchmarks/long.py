"""Long runs of ResNet-20 on all of CIFAR-10: do trained indicators pay off after an epoch of joint training?

    python examples/benchmarks/long.py --dry
    python examples/benchmarks/long.py --rows a b
    python examples/benchmarks/long.py --report

Rows run in the order of `ROWS`. Each is kept in the cache folder ($HUB_MPQ_CACHE), and a stopped row resumes from its
newest state. Methods are those of study.py; "mixed" has trained indicators.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nets
import study
from safetensors.torch import load_file, save_file
from tasks import LEVELS, TASKS, Task, cifar_train, lifted_resnet20, wrapped
from torch import nn

from hub_mpq.search.limpq import LIMPQ
from hub_mpq.search.strategy import register_strategy

BATCH = 128


@dataclass(frozen=True)
class Row:
    """A row: `joint` and `tune` are epochs of joint training and of fine-tuning.

    start: "float", or "joint": fine-tuning starts from the weights of the joint training, for uniform too.
    """

    letter: str
    method: str
    level: str = "W2A2"
    seed: int = 0
    joint: int = 1
    tune: int = 2
    start: str = "float"

    @property
    def folder(self) -> Path:
        """Folder of the rows that may be compared with each other."""
        return study.cache_root() / "long" / f"{self.joint}-joint-{self.tune}-tuned-from-{self.start}"

    @property
    def kept(self) -> Path:
        """File of the weights of the joint training."""
        set_of = LEVELS[self.level].name
        return study.cache_root() / "long" / f"weights-{set_of}-{self.joint}-{self.seed}.safetensors"


ROWS = [
    *(Row("a", method) for method in ("uniform", "untrained", "mixed")),
    Row("b", "scale"),
    *(Row("c", method, seed=1) for method in ("uniform", "untrained", "mixed", "scale")),
    *(Row("d", method, level="W3A3") for method in ("uniform", "untrained", "mixed", "scale")),
    *(Row("e", method, joint=3, tune=5) for method in ("uniform", "untrained", "mixed", "scale")),
    *(Row("f", method, start="joint") for method in ("uniform", "untrained", "mixed")),
]


@register_strategy("limpq-keeping-weights")
class Keeping(LIMPQ):
    """LIMPQ that keeps the weights of its joint training in a file, with all banks of the norms."""

    def __init__(self, *, keep: str, **options: Any) -> None:
        super().__init__(**options)
        self.keep = keep

    def read_out(self, model: nn.Module, batches: Any) -> None:
        """Write the weights, then read out the scores."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, self.keep)
        super().read_out(model, batches)


def trained_resnet20(row: Row) -> nn.Module:
    """Return ResNet-20 with the weights of the joint training and the norms of the bank of the level's weight bits."""
    net, kept = nets.resnet20(), load_file(row.kept)
    bank = LEVELS[row.level].widths.weight.index(int(row.level[1]))
    state = {
        name: kept[name] if name in kept else kept[f"{name}_bank"][bank]
        for name in net.state_dict()
        if not name.endswith("num_batches_tracked")
    }
    net.load_state_dict(state, strict=False)
    return net.eval()


def task_of(row: Row, steps: int | None = None) -> Task:
    """Return the study's task at the length of a row, or with `steps` steps of each training."""
    build = (lambda: trained_resnet20(row)) if row.start == "joint" else lifted_resnet20
    return replace(
        TASKS["resnet20"],
        build=lambda: wrapped(build(), "resnet20", 3, 32, 32),
        train=lambda seed: cifar_train(seed, BATCH),
        indicator_steps=steps,
        indicator_options={"epochs": row.joint},
        tune_steps=steps,
        tune_options={"epochs": row.tune, "lr": 5e-4, "scale_lr": 3e-3},
    )


def run(row: Row, steps: int | None = None) -> None:
    """Run a row unless it is finished. A row that starts from joint weights uses the indicators of that training."""
    row.folder.mkdir(parents=True, exist_ok=True)
    options = {"strategy": "limpq-keeping-weights", "strategy_options": {"keep": str(row.kept)}}
    first = replace(row, start="float").folder
    study.run(task_of(row, steps), row.method, row.level, row.seed, row.folder, options, indicators=first)


def dry(rows: list[Row]) -> None:
    """Estimate the hours that the rows take from ten steps of each training."""
    mpq, train = wrapped(nets.resnet20(), "resnet20", 3, 32, 32), cifar_train(0, BATCH)
    mpq.apply_policy("W2A2", train, reestimate_norms=False)
    tuned = mpq.finetune(train, steps=10).step_seconds
    joint = {}
    for level in sorted({row.level for row in rows}):
        scores = mpq.train_indicators(train, candidates=LEVELS[level].widths, steps=10)
        joint[level] = scores.provenance["step_seconds"]
    trained = {(r.level, r.seed, r.joint, r.method) for r in rows if r.method in ("mixed", "scale")}
    epoch = len(train)
    whole = sum(joint[level] * epoch * epochs for level, _, epochs, _ in trained)
    whole += sum(tuned * epoch * row.tune for row in rows)
    print(f"on {study.device_name()}: {tuned:.3f} s a step of fine-tuning, joint {joint}, {epoch} steps an epoch")
    print(f"{len(rows)} rows: about {whole / 3600:.1f} h")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", choices=sorted({row.letter for row in ROWS}), help="letters of the rows; default: all"
    )
    parser.add_argument("--dry", action="store_true", help="measure ten steps and estimate the hours")
    parser.add_argument("--report", action="store_true", help="print the tables of the finished rows and exit")
    args = parser.parse_args()
    chosen = [row for row in ROWS if args.rows is None or row.letter in args.rows]
    if args.report:
        for folder in dict.fromkeys(row.folder for row in ROWS if row.folder.exists()):
            print(f"\n## {folder.name.replace('-', ' ')}")
            study.report(folder)
        return
    if args.dry:
        dry(chosen)
        return
    for row in chosen:
        run(row)


if __name__ == "__main__":
    main()
