"""hub-mpq indicators, quantize, finetune, evaluate, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidArgument
from . import models, show
from . import options as o
from .resume import Run, check_file, check_folder


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
    seed: o.Seed = 0,
    pin: o.Pin = None,
    exclude: o.Exclude = None,
    library: o.Library = None,
    input_size: o.InputSize = None,
    model_arg: o.ModelArg = None,
    checkpoint_path: o.CheckpointPath = None,
    pretrained: o.Pretrained = True,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Learn every layer's importance once; it serves every later budget."""
    settings = _settings(locals())
    check_file(output, overwrite)
    _check_plot(plot)
    widths = o.candidates_of(candidates)
    mpq = models.load(model, **_model_options(locals()))
    train = models.loader(mpq, data, train=True, **_data_options(locals()), seed=seed)
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
            resume=run.resume,
        )
        write_indicators(output, learned)
    if plot is not None:
        from ..plot import plot_indicators

        plot_indicators(learned, plot)
    tree = {"output": str(output), "layers": len(learned.weight), "provenance": dict(learned.provenance)}
    moved = [f"  {k} scales: {_movement(v)}" for k, v in learned.provenance["movement"].items() if v]
    text = "\n".join([f"indicators of {len(learned.weight)} layers in {output}", *moved])
    show.emit(as_json, {**tree, "seconds": mpq.seconds}, text)


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
    seed: o.Seed = 0,
    pin: o.Pin = None,
    exclude: o.Exclude = None,
    library: o.Library = None,
    input_size: o.InputSize = None,
    model_arg: o.ModelArg = None,
    checkpoint_path: o.CheckpointPath = None,
    pretrained: o.Pretrained = True,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Indicators, search, quantizers, fine-tuning and a packed folder, in one command."""
    settings = _settings(locals())
    budget = o.budget_of(
        bitops=bitops,
        size=size,
        compression=compression,
        weight_bits=weight_bits,
        activation_memory=activation_memory,
        activation_peak=activation_peak,
    )
    check_folder(output, overwrite)
    _check_plot(plot)
    widths = o.candidates_of(candidates)
    mpq = models.load(model, **_model_options(locals()))
    options = _data_options(locals())
    train = models.loader(mpq, data, train=True, **options, seed=seed) if data else None
    measured = models.loader(mpq, val, train=False, **options) if val else None
    if indicators is not None:
        models.indicators_for(mpq, indicators)
    from ..pack import read_indicators, write_indicators

    tuning = {key: value for key, value in (("lr", lr), ("distill", distill)) if value is not None}
    with Run(output, settings, resume=resume) as run:
        stored = run.folder / "indicators.safetensors"
        if mpq.indicators is None and stored.is_file():
            mpq.indicators = read_indicators(stored)
        if mpq.indicators is None and train is not None:
            learned = mpq.train_indicators(
                train,
                candidates=widths,
                epochs=indicator_epochs,
                steps=indicator_steps,
                seed=seed,
                checkpoint_dir=run.folder / "indicators",
                resume=run.resume,
            )
            write_indicators(stored, learned)
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
            finetune_options=tuning,
            **budget,
        )
        saved = mpq.save_pretrained(output)
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
    seed: o.Seed = 0,
    pin: o.Pin = None,
    exclude: o.Exclude = None,
    library: o.Library = None,
    input_size: o.InputSize = None,
    model_arg: o.ModelArg = None,
    checkpoint_path: o.CheckpointPath = None,
    pretrained: o.Pretrained = True,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Train a quantized model on, or a float one at a policy that is known."""
    settings = _settings(locals())
    check_folder(output, overwrite)
    _check_plot(plot)
    packed = models.is_packed(model)
    if packed and policy is not None:
        raise InvalidArgument(f"{model} has its policy already; leave --policy out")
    if not packed and policy is None:
        raise InvalidArgument(f"{model!r} has no policy; pass --policy W4A4 or --policy FILE")
    mpq = models.load(model, **_model_options(locals()))
    chosen = None if policy is None else models.read_policy(policy, mpq)
    options = _data_options(locals())
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
            resume=run.resume,
            **tuning,
        )
        if measured is not None:
            mpq.evaluate(measured)
        saved = mpq.save_pretrained(output)
    _finish(mpq, output, saved, plot, as_json)


def evaluate(
    model: o.Model,
    data: o.Data,
    class_map: o.ClassMap = None,
    batch_size: o.BatchSize = 64,
    workers: o.Workers = 2,
    exclude: o.Exclude = None,
    library: o.Library = None,
    input_size: o.InputSize = None,
    model_arg: o.ModelArg = None,
    checkpoint_path: o.CheckpointPath = None,
    pretrained: o.Pretrained = True,
    as_json: o.Json = False,
) -> None:
    """Top-1, top-5 and loss on labelled images, of a float model or a packed folder."""
    mpq = models.load(model, **_model_options(locals()))
    figures = mpq.evaluate(models.loader(mpq, data, train=False, **_data_options(locals())))
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


def _finish(mpq: Any, output: Path, saved: int, plot: Path | None, as_json: bool) -> None:
    """Picture and report of a folder that was just saved."""
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


def _movement(figures: dict[str, float]) -> str:
    return (
        f"median change {100 * figures['median_change']:.2f} %, rank correlation with the start "
        f"{figures['rank_correlation']:.3f}"
    )


def _check_plot(plot: Path | None) -> None:
    """A picture that cannot be drawn must not cost a training first."""
    if plot is not None:
        from ..plot import check_plot

        check_plot(plot)


_MODEL_OPTIONS = ("library", "input_size", "model_arg", "checkpoint_path", "pretrained", "pin", "exclude")
_NO_SETTINGS = ("output", "resume", "overwrite", "plot", "as_json", "workers")


def _model_options(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in _MODEL_OPTIONS if name in given}


def _data_options(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("class_map", "batch_size", "workers")}


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    return {name: value for name, value in given.items() if name not in _NO_SETTINGS}
