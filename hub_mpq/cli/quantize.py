"""hub-mpq quantize and finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidArgument
from . import given, models, show
from . import options as o
from .launch import is_main, on_main
from .resume import Run, check_folder


def quantize(
    model: o.Model,
    output: o.Output,
    data: o.OptionalData = None,
    val: o.Val = None,
    bitops: o.Bitops = None,
    size: o.Size = None,
    compression: o.Compression = None,
    weight_bits: o.WeightBits = None,
    activation_memory: o.ActivationMemory = None,
    activation_peak: o.ActivationPeak = None,
    candidates: o.CandidateBits = None,
    alpha: o.Alpha = None,
    strategy: o.Strategy = "limpq",
    strategy_option: o.StrategyOption = None,
    indicators: o.Indicators = None,
    indicator_epochs: Annotated[float, typer.Option(min=0, help="Length of the indicators' training.")] = 1,
    indicator_steps: Annotated[o.Count, typer.Option(min=0, help="The same in steps.")] = None,
    epochs: o.Epochs = 1,
    steps: o.Steps = None,
    lr: o.LearningRate = None,
    distill: Annotated[
        o.Number, typer.Option(min=0, max=1, help="Weight of distillation from the float model.")
    ] = None,
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
    checkpoint_every: o.CheckpointEvery = 500,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    log_with: o.LogWith = None,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Indicators, search, quantizers, fine-tuning and a packed folder, in one command."""
    settings = given.settings_of(locals())
    search = given.search_of(strategy, strategy_option, indicator_epochs, indicator_steps)
    budget = o.budget_of(locals(), needed=given.needs_budget(strategy))
    check_folder(output, overwrite, resume)
    given.check_plot(plot)
    widths = o.candidates_of(candidates)
    engine = given.engine_of(locals())
    mpq = models.load(model, **given.model_options(locals()))
    options = given.data_options(locals())
    train = models.loader(mpq, data, train=True, **options, seed=seed) if data else None
    measured = models.loader(mpq, val, train=False, **options) if val else None
    if indicators is not None:
        models.indicators_for(mpq, indicators)
    if budget:
        mpq.check_reachable(widths, strategy=strategy, **budget)
    from ..pack import read_indicators, write_indicators

    tuning = {key: value for key, value in (("lr", lr), ("distill", distill)) if value is not None}
    with Run(output, settings, resume=resume) as run:
        stored = run.folder / "indicators.safetensors"
        learns = strategy == "limpq" and mpq.indicators is None
        if learns and stored.is_file():
            mpq.indicators = read_indicators(stored)
        if learns and mpq.indicators is None and train is not None:
            learned = mpq.train_indicators(
                train,
                candidates=widths,
                epochs=indicator_epochs,
                steps=indicator_steps,
                seed=seed,
                checkpoint_dir=run.folder / "indicators",
                checkpoint_every=checkpoint_every,
                resume=run.resume,
                engine=engine,
            )
            on_main(lambda: write_indicators(stored, learned))
        mpq.quantize(
            train=train,
            val=measured,
            epochs=epochs,
            steps=steps,
            alpha=alpha,
            candidates=widths,
            seed=seed,
            checkpoint_dir=run.folder,
            resume=run.resume,
            engine=engine,
            finetune_options={**tuning, "checkpoint_every": checkpoint_every},
            **search,
            **budget,
        )
        saved = on_main(lambda: mpq.save_pretrained(output))
    models.tell_corrupt(train, measured)
    if is_main() and mpq.indicators is not None:
        for picture in given.pictures(None, output, log_with):
            from ..plot import plot_indicators

            plot_indicators(mpq.indicators, picture)
    _finish(mpq, output, saved, plot, as_json)


def finetune(
    model: Annotated[
        str, typer.Argument(help="A packed folder, or a model together with --policy.", show_default=False)
    ],
    data: o.Data,
    output: o.Output,
    policy: Annotated[o.Text, typer.Option(help="A level (W4A4) or a file that `search --json` wrote.")] = None,
    val: o.Val = None,
    epochs: o.Epochs = 1,
    steps: o.Steps = None,
    lr: o.LearningRate = None,
    distill: Annotated[
        o.Number, typer.Option(min=0, max=1, help="Weight of distillation from the float model.")
    ] = None,
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
    checkpoint_every: o.CheckpointEvery = 500,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    log_with: o.LogWith = None,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Train a quantized model on, or a float one at a policy that is known."""
    settings = given.settings_of(locals())
    check_folder(output, overwrite, resume)
    given.check_plot(plot)
    packed = models.is_packed(model)
    if packed and policy is not None:
        raise InvalidArgument(f"{model} has its policy already; leave --policy out")
    if not packed and policy is None:
        raise InvalidArgument(f"{model!r} has no policy; pass --policy W4A4 or --policy FILE")
    engine = given.engine_of(locals())
    mpq = models.load(model, **given.model_options(locals()))
    chosen = None if policy is None else models.read_policy(policy, mpq)
    options = given.data_options(locals())
    train = models.loader(mpq, data, train=True, **options, seed=seed)
    measured = models.loader(mpq, val, train=False, **options) if val else None
    tuning: dict[str, Any] = {k: v for k, v in (("lr", lr), ("distill", distill)) if v is not None}
    with Run(output, settings, resume=resume) as run:
        if chosen is not None:
            if measured is not None:
                mpq.evaluate(measured)
            mpq.apply_policy(chosen, train, reestimate_norms=False)
        mpq.finetune(
            train,
            epochs=epochs,
            steps=steps,
            seed=seed,
            checkpoint_dir=run.folder / "finetune",
            checkpoint_every=checkpoint_every,
            resume=run.resume,
            engine=engine,
            **tuning,
        )
        if measured is not None:
            mpq.evaluate(measured)
        saved = on_main(lambda: mpq.save_pretrained(output))
    models.tell_corrupt(train, measured)
    _finish(mpq, output, saved, plot, as_json)


def _finish(mpq: Any, output: Path, saved: int, plot: Path | None, as_json: bool) -> None:
    """Picture and report of a folder that was just saved."""
    if not is_main():
        return
    if plot is not None:
        from ..plot import plot_policy

        plot_policy(mpq.graph, mpq.policy, plot)
    tree = {
        "output": str(output),
        "packed_bytes": saved,
        "usage": dict(mpq.usage().amounts),
        "metrics": mpq.metrics,
        "seconds": mpq.seconds,
        "policy": mpq.policy.to_dict(),
    }
    if mpq.result is not None:
        tree["search"] = {k: v for k, v in mpq.result.to_dict().items() if k not in ("policy", "usage")}
    show.emit(as_json, tree, f"{mpq.report()}\nsaved {output}: {saved:,} bytes packed")
