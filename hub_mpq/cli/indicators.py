"""hub-mpq indicators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import given, models, show
from . import options as o
from .launch import is_main, on_main
from .resume import Run, check_file


def indicators(
    model: o.Model,
    data: o.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")],
    candidates: o.CandidateBits = None,
    epochs: o.Epochs = 1,
    steps: o.Steps = None,
    share: Annotated[float, typer.Option(help="Part of each epoch's batches that is used.")] = 1.0,
    preset: Annotated[
        str, typer.Option(help="short, or authors: LIMPQ's own settings for ImageNet-sized runs.")
    ] = "short",
    lr: o.LearningRate = None,
    freeze_weights: Annotated[bool, typer.Option("--freeze-weights", help="Only scales and norms learn.")] = False,
    class_map: o.ClassMap = None,
    batch_size: o.BatchSize = 64,
    workers: o.Workers = 2,
    max_corrupt: o.MaxCorrupt = 0.01,
    seed: o.Seed = 0,
    pin: o.Pin = None,
    exclude: o.Exclude = None,
    weight_only: o.WeightOnly = False,
    tie_fused: o.TieFused = False,
    library: o.Library = None,
    input_size: o.InputSize = None,
    model_arg: o.ModelArg = None,
    checkpoint_path: o.CheckpointPath = None,
    pretrained: o.Pretrained = True,
    bf16: o.Bf16 = False,
    gradient_checkpointing: o.Recompute = False,
    channels_last: o.ChannelsLast = False,
    compile: o.Compile = False,
    sync_batch_norm: o.SyncNorms = False,
    fsdp: o.Fsdp = False,
    checkpoint_every: o.CheckpointEvery = 500,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    log_with: o.LogWith = None,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Learn every layer's importance once; it serves every later budget."""
    settings = given.settings_of(locals())
    check_file(output, overwrite, resume)
    given.check_plot(plot)
    widths = o.candidates_of(candidates)
    engine = given.engine_of(locals())
    mpq = models.load(model, **given.model_options(locals()))
    train = models.loader(mpq, data, train=True, **given.data_options(locals()), seed=seed)
    from ..pack import write_indicators

    with Run(output, settings, resume=resume) as run:
        learned = mpq.train_indicators(
            train,
            candidates=widths,
            epochs=epochs,
            steps=steps,
            share=share,
            preset=preset,
            lr=lr,
            freeze_weights=freeze_weights,
            seed=seed,
            checkpoint_dir=run.folder / "indicators",
            checkpoint_every=checkpoint_every,
            resume=run.resume,
            engine=engine,
        )
        on_main(lambda: write_indicators(output, learned))
    models.tell_corrupt(train)
    if not is_main():
        return
    for picture in given.pictures(plot, output, log_with):
        from ..plot import plot_indicators

        plot_indicators(learned, picture)
    tree = {"output": str(output), "layers": len(learned.weight), "provenance": dict(learned.provenance)}
    moved = [f"  {k} scales: {_movement(v)}" for k, v in learned.provenance["movement"].items() if v]
    text = "\n".join([f"indicators of {len(learned.weight)} layers in {output}", *moved])
    show.emit(as_json, {**tree, "seconds": mpq.seconds}, text)


def _movement(figures: dict[str, float]) -> str:
    return (
        f"median change {100 * figures['median_change']:.2f} %, rank correlation with the start "
        f"{figures['rank_correlation']:.3f}"
    )
