"""hub-mpq evaluate and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import given, models, show
from . import options as o
from .launch import is_main


def evaluate(
    model: o.Model,
    data: o.Data,
    class_map: o.ClassMap = None,
    batch_size: o.BatchSize = 64,
    workers: o.Workers = 2,
    max_corrupt: o.MaxCorrupt = 0.01,
    exclude: o.Exclude = None,
    library: o.Library = None,
    input_size: o.InputSize = None,
    model_arg: o.ModelArg = None,
    checkpoint_path: o.CheckpointPath = None,
    pretrained: o.Pretrained = True,
    as_json: o.Json = False,
) -> None:
    """Top-1, top-5 and loss on labelled images, of a float model or a packed folder."""
    mpq = models.load(model, **given.model_options(locals()))
    loader = models.loader(mpq, data, train=False, **given.data_options(locals()))
    figures = mpq.evaluate(loader)
    models.tell_corrupt(loader)
    if not is_main():
        return
    text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    show.emit(as_json, {"model": model, "quantized": mpq.policy is not None, **figures}, text)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("hub-mpq-demo"),
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """The whole route on scikit-learn's handwritten digits, with no network."""
    from ..demo import run, summary

    figures = run(output, seed=seed, say=lambda text: typer.echo(text, err=True))
    show.emit(as_json, figures, summary(figures))
