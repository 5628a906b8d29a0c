"""hub-mpq evaluate and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report import figures_line
from . import models, show
from . import options as o
from .launch import is_main


def evaluate(
    model: o.Model,
    data: o.Data,
    loading: Annotated[o.ModelOptions, o.Group(without=("pin", "weight_only", "tie_fused", "target"))],
    reading: o.DataOptions,
    as_json: o.Json = False,
) -> None:
    """The metrics of the model's task on labelled images, of a float model or a packed folder."""
    mpq = models.load(model, loading)
    loader = models.loader(mpq, data, reading, train=False)
    figures = mpq.evaluate(loader)
    models.tell_corrupt(loader)
    if not is_main():
        return
    show.emit(as_json, {"model": model, "quantized": mpq.policy is not None, **figures}, figures_line(figures))


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("hub-mpq-demo"),
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """The whole route on scikit-learn's handwritten digits, with no network."""
    from ..demo import run, summary

    figures = run(output, seed=seed, say=lambda text: typer.echo(text, err=True))
    show.emit(as_json, figures, summary(figures))
