"""hub-mpq evaluate and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.checks import MAX_INT
from ..errors import InvalidArgument
from ..report import figures_line
from . import models, show
from . import options as o
from .launch import is_main


def evaluate(
    model: o.Model,
    data: o.Data,
    loading: Annotated[o.ModelOptions, o.Group(without=("pin", "weight_only", "tie_fused", "target", "per_expert"))],
    reading: Annotated[o.DataOptions, o.Group(without=("chunk_length",))],
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=MAX_INT,
            help="Tokens per window of text. Default: 1024, or the model's maximum if that is less.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_INT,
            help="Tokens from one window to the next. Default: --context. A smaller one gives each token more context.",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Runtime for a packed folder: auto, torch, onednn, openvino, onnxruntime or bit_serial. "
            "Default: none, quantizers compute in float."
        ),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Measure a float or packed model: the task's metrics on labelled images, or perplexity per token on text."""
    mpq = models.load(model, loading, runtime=runtime)
    if models.reads_text(mpq):
        figures = mpq.perplexity(data, context=context, stride=stride)
    else:
        if context is not None or stride is not None:
            raise InvalidArgument(f"--context and --stride are only for models that read text, and {model} does not")
        loader = models.loader(mpq, data, reading, train=False)
        figures = mpq.evaluate(loader)
        models.tell_corrupt(loader)
    if not is_main():
        return
    tree = {"model": model, "quantized": mpq.policy is not None, **models.runs_on(mpq), **figures}
    show.emit(as_json, tree, figures_line(figures))


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")] = Path("hub-mpq-demo"),
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Run the whole pipeline on scikit-learn's handwritten digits; needs no network."""
    from ..demo import run, summary

    figures = run(output, seed=seed, say=lambda text: typer.echo(text, err=True))
    show.emit(as_json, figures, summary(figures))
