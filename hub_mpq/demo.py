"""The whole pipeline on scikit-learn's handwritten digits, without a network."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from .core import FLOAT_BITS, human
from .data import Shuffled
from .errors import HubMPQError
from .model import HubMPQ
from .pack.atomic import write_atomic
from .plot import check_plot, plot_policy
from .report import table
from .train.finetune import finetune

MODEL = "resnet10t"
SIDE = 16  # the 8×8 images are enlarged: a residual network halves its input five times
TEST = 597
FLOAT_EPOCHS, INDICATOR_EPOCHS, TUNE_EPOCHS = 15, 4, 6
PICTURE, FIGURES = "policy.png", "demo.json"


def digits(seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) for training, the same for testing): 1200 and 597 images of shape [1, 16, 16], normalised."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise HubMPQError("the demo needs scikit-learn: pip install 'hub-mpq[demo]'") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[TEST:], order[:TEST]
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return (images[train], labels[train]), (images[test], labels[test])


@contextmanager
def _quiet_timm() -> Iterator[None]:
    """Silence timm's warning that its default mean has three channels; the digits are normalised here."""
    logger = logging.getLogger("timm.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Demo:
    """One run: the model, its data, and the seconds of each stage."""

    def __init__(self, seed: int, say: Callable[[str], None]) -> None:
        self.seed, self.say = seed, say
        self.seconds: dict[str, float] = {}
        (x, y), test = digits(seed)
        self.train = DataLoader(TensorDataset(x, y), batch_size=64, sampler=Shuffled(len(y), seed))
        self.test = DataLoader(TensorDataset(*test), batch_size=256)
        with torch.random.fork_rng(devices=[]), _quiet_timm():
            torch.manual_seed(seed)
            self.mpq = HubMPQ.from_pretrained(
                MODEL,
                pretrained=False,
                in_chans=1,
                num_classes=10,
                channels=(16, 32, 64, 128),
                input_size=(1, SIDE, SIDE),
            )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and print when it is done."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        self.say(f"{name}: {self.seconds[name]:.1f} s")

    def row(self, name: str, stage: str) -> dict[str, Any]:
        """Fine-tune at the applied policy, measure, and return the row of the table."""
        mpq = self.mpq
        with self.stage(stage):
            mpq.finetune(self.train, epochs=TUNE_EPOCHS, lr=1e-3, scale_lr=1e-2, seed=self.seed)
            figures = mpq.evaluate(self.test)
        usage = mpq.usage()
        return {"row": name, "top1": figures["top1"], "bitops": usage["bitops"], "bytes": usage["size"]}

    def float_row(self) -> dict[str, Any]:
        """Train the float model and return its row."""
        mpq = self.mpq
        with self.stage("train float"):
            finetune(mpq.model, self.train, epochs=FLOAT_EPOCHS, lr=3e-3, weight_decay=1e-2, seed=self.seed)
            figures = mpq.evaluate(self.test)
        macs = sum(layer.macs for layer in mpq.graph) + sum(op.macs for op in mpq.graph.floats)
        nbytes = sum(t.numel() * t.element_size() for t in mpq.model.state_dict().values())
        return {"row": "float", "top1": figures["top1"], "bitops": macs * FLOAT_BITS**2, "bytes": nbytes}


def run(output: str | Path = "hub-mpq-demo", *, seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the demo and return its figures as JSON values.

    Args:
        output: Output folder.
        seed: Random seed.
        say: Receives one line per stage.

    Raises:
        HubMPQError: `output` exists and was not written by the demo, or the saved model does not give the logits of the
            one in memory.
    """
    output = Path(output)
    check_plot(output / PICTURE)
    if output.exists() and not (output.is_dir() and {p.name for p in output.iterdir()} <= {"model", PICTURE, FIGURES}):
        raise HubMPQError(
            f"{output} already exists and was not written by the demo; choose another folder with --output"
        )
    threads = torch.get_num_threads()
    # layers this small are not faster on more, and the figures then do not depend on the number
    torch.set_num_threads(1)
    try:
        return _run(output, seed, say)
    finally:
        torch.set_num_threads(threads)


def _run(output: Path, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    began = time.perf_counter()
    demo = Demo(seed, say)
    mpq, rows = demo.mpq, [demo.float_row()]
    with demo.stage("indicators"):
        mpq.train_indicators(demo.train, epochs=INDICATOR_EPOCHS, seed=seed)
    level = mpq.usage("W4A4")["bitops"]
    with demo.stage("search (two budgets)"):
        same, half = mpq.search(bitops="W4A4"), mpq.search(bitops=level / 2)
    mpq.apply_policy("W4A4", demo.train, reestimate_norms=False)
    rows.append(demo.row("uniform W4A4", "fine-tune uniform W4A4"))
    mpq.apply_policy(half.policy, demo.train, reestimate_norms=False)
    last = demo.row("mixed, half of the BitOps", "fine-tune mixed, half")
    mpq.apply_policy(same.policy, demo.train, reestimate_norms=False)
    mpq.result = same
    rows += [demo.row("mixed, same BitOps", "fine-tune mixed, same"), last]
    with demo.stage("pack and save"):
        saved = mpq.save_pretrained(output / "model")
    with demo.stage("load and compare"):
        equal = _same_answers(mpq, output / "model", demo.test)
    plot_policy(mpq.graph, same.policy, output / PICTURE, title=f"{MODEL} on digits: W4A4 BitOps, mixed")
    demo.seconds["total"] = time.perf_counter() - began
    figures = {
        "rows": rows,
        "seconds": demo.seconds,
        "packed_bytes": saved,
        "equal_logits": equal,
        "seed": seed,
    }
    write_atomic(output / FIGURES, [(json.dumps(figures, indent=2) + "\n").encode()])
    if not equal:
        raise HubMPQError(
            f"the model loaded from {output / 'model'} gives different logits than the one that was saved"
        )
    return {**figures, "output": str(output)}


@torch.no_grad()
def _same_answers(mpq: HubMPQ, folder: Path, test: DataLoader[Any]) -> bool:
    """Whether the reloaded model gives bit-identical logits on all test images, on the CPU."""
    with _quiet_timm():
        loaded = HubMPQ.from_pretrained(folder)
    here, there = mpq.model.cpu().eval(), loaded.model.cpu().eval()
    return all(torch.equal(here(x), there(x)) for x, _ in test)


def summary(figures: dict[str, Any]) -> str:
    """The tables of results and times."""
    rows = [[r["row"], f"{r['top1']:.2f} %", human(r["bitops"]), f"{r['bytes']:,}"] for r in figures["rows"]]
    stages = [[name, f"{seconds:.2f}"] for name, seconds in figures["seconds"].items()]
    output = Path(figures["output"])
    return "\n".join(
        [
            table(["digits", "top-1", "BitOps", "bytes"], rows),
            f"one of the {TEST} test images is {100 / TEST:.2f} %: differences of a few images are noise",
            "",
            table(["stage", "seconds"], stages),
            "",
            f"saved {output / 'model'}: {figures['packed_bytes']:,} bytes packed; reloaded with bit-identical logits",
            f"bits per layer: {output / 'policy.png'}",
        ]
    )
