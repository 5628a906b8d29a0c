"""hub-mpq indicators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import Engine, IndicatorOptions
from . import models, show
from . import options as o
from .launch import is_main
from .resume import Run, check_file


def indicators(
    model: o.Model,
    data: o.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output file (.safetensors)."), o.FREE],
    training: IndicatorOptions,
    loading: o.ModelOptions,
    reading: o.DataOptions,
    engine: Engine,
    settings: o.Settings,
    candidates: o.CandidateBits = None,
    seed: o.Seed = 0,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Learn the importance of every layer at every bit-width, once for all budgets.

    Runs on a GPU if there is one; CUDA_VISIBLE_DEVICES= (empty) hides it.
    """
    check_file(output, overwrite, resume)
    o.check_plot(plot)
    widths = o.candidates_of(candidates)
    engine = o.engine_for(engine, output)
    mpq = models.load(model, loading)
    train = models.loader(mpq, data, reading, train=True, seed=seed)
    from ..pack import write_indicators
    from ..train.processes import on_main

    with Run(output, settings, resume=resume) as run:
        states: dict[str, Any] = {"checkpoint_dir": run.folder / "indicators", "resume": run.resume}
        training = IndicatorOptions.of(training, seed=seed, **states)
        found = mpq.train_indicators(train, training, candidates=widths, engine=engine)
        on_main(lambda: write_indicators(output, found))
    models.tell_corrupt(train)
    if not is_main():
        return
    for picture in o.pictures(plot, output, engine.log_with):
        from ..plot import plot_indicators

        plot_indicators(found, picture)
        show.saved(picture)
    tree = {"output": str(output), "layers": len(found.weight), "provenance": dict(found.provenance)}
    moved = [f"  {k} scales: {_movement(v)}" for k, v in found.provenance["movement"].items() if v]
    text = "\n".join([f"saved {output}: indicators of {len(found.weight)} layers", *moved])
    show.emit(as_json, {**tree, "seconds": mpq.seconds}, text)


def _movement(figures: dict[str, float]) -> str:
    return (
        f"median change {100 * figures['median_change']:.2f} %, rank correlation with the start "
        f"{figures['rank_correlation']:.3f}"
    )
