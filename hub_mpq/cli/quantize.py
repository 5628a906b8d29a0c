"""hub-mpq quantize and finetune."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import FLOAT_BITS, Budget, Engine, FinetuneOptions, IndicatorOptions, LayerBits, limits
from ..errors import InvalidArgument
from . import models, show
from . import options as o
from .launch import is_main
from .resume import Run, check_folder

NoShards = Annotated[Engine, o.Group(without=("fsdp",))]


def quantize(
    model: o.Model,
    output: o.Output,
    budget: Budget | None,
    training: Annotated[IndicatorOptions, o.Group("indicator_", only=("epochs", "steps"))],
    tuning: FinetuneOptions,
    loading: o.ModelOptions,
    reading: o.DataOptions,
    engine: NoShards,
    settings: o.Settings,
    invocation: Annotated[typer.Context, o.FREE],
    data: o.OptionalData = None,
    text: o.CalibrationText = None,
    val: o.Val = None,
    candidates: o.CandidateBits = None,
    group_size: o.GroupSize = None,
    asymmetric: o.Asymmetric = False,
    rounding: o.Rounding = None,
    alpha: o.Alpha = None,
    strategy: o.Strategy = None,
    strategy_option: o.StrategyOption = None,
    indicators: o.TrainedIndicators = None,
    validate: Annotated[
        bool, typer.Option(help="Measure policies before one is chosen, on --val, else on a part of --data or --text.")
    ] = True,
    validate_seconds: o.ValidateSeconds = None,
    seed: o.Seed = 0,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Train indicators, search a policy, quantize, fine-tune and save, in one command.

    Runs on a GPU if there is one; CUDA_VISIBLE_DEVICES= (empty) hides it.
    """
    from ..search.strategy import build_strategy, infers_widths
    from ..train.round_weights import check_rounding

    stored = models.read_indicators_of(indicators) if indicators is not None else None
    given = strategy
    strategy = strategy or (stored.strategy if stored is not None else "limpq")
    strategy_options = o.model_args_of(strategy_option, "--strategy-option")
    sizes = o.group_sizes_of(group_size)
    check_rounding(rounding)
    if stored is None:
        build_strategy(strategy, strategy_options)  # fail before the model is loaded if a name or option is unknown
    if budget is None and (stored.inferred is None if stored is not None else not infers_widths(strategy)):
        Budget()
    check_folder(output, overwrite, resume)
    o.check_plot(plot)
    widths = o.candidates_of(candidates)
    engine = o.engine_for(engine, output)
    if text is not None:
        if data is not None:
            raise InvalidArgument("--data and --text cannot be combined; pass one of them")
        if tuning.steps is None and invocation.get_parameter_source("epochs").name == "DEFAULT":  # type: ignore[union-attr]
            tuning = replace(tuning, epochs=0)
        if budget is not None and loading.target is None and not _limits_inputs(budget):
            loading = replace(loading, weight_only=True)
    mpq = models.load(model, loading)
    if text is not None and not models.reads_text(mpq):
        raise InvalidArgument(f"{model} does not read text; pass --data instead of --text")
    source = data or text
    train = models.loader(mpq, source, reading, train=True, seed=seed) if source else None
    measured = models.loader(mpq, val, reading, train=False) if val else None
    from ..train.processes import on_main

    with Run(output, settings, resume=resume) as run:
        learning = IndicatorOptions.of(training, {"checkpoint_every": tuning.checkpoint_every})
        mpq.quantize(
            budget,
            train=train,
            val=measured,
            strategy=given,
            strategy_options=strategy_options,
            indicators=stored,
            indicator_options=learning,
            alpha=alpha,
            candidates=widths,
            group_size=sizes,
            symmetric=not asymmetric,
            rounding=rounding,
            seed=seed,
            checkpoint_dir=run.folder,
            resume=run.resume,
            finetune_options=tuning,
            engine=engine,
            validate=validate,
            validate_seconds=validate_seconds,
        )
        saved = on_main(lambda: mpq.save_pretrained(output))
    models.tell_corrupt(train, measured)
    if is_main() and mpq.scores is not None and mpq.scores.weight:
        for picture in o.pictures(None, output, engine.log_with):
            from ..plot import plot_indicators

            plot_indicators(mpq.scores, picture)
    _finish(mpq, output, saved, plot, as_json)


def _limits_inputs(budget: Budget) -> bool:
    """Whether a budget determines how inputs are quantized: by a level with their bit-width, or by what it limits."""
    levels = [value for value in budget.limits.values() if isinstance(value, LayerBits)]
    named = any(level.activation != FLOAT_BITS for level in levels)
    if budget.latency_table is not None:
        return True  # layers with float inputs compute in float
    return named or any("activation" in limits.get(name).level_parts for name in budget.limits)


def finetune(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A packed folder, or a float model with --policy.", show_default=False),
    ],
    data: o.Data,
    output: o.Output,
    tuning: FinetuneOptions,
    loading: o.ModelOptions,
    reading: o.DataOptions,
    engine: NoShards,
    settings: o.Settings,
    policy: Annotated[
        o.Text,
        typer.Option(help="Policy for a float model: a level (W4A4), or a file with the output of `search --json`."),
    ] = None,
    val: o.Val = None,
    seed: o.Seed = 0,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Fine-tune a packed model, or a float model at a given policy."""
    check_folder(output, overwrite, resume)
    o.check_plot(plot)
    packed = models.is_packed(model)
    if packed and policy is not None:
        raise InvalidArgument(f"{model} already has a policy; omit --policy")
    if not packed and policy is None:
        raise InvalidArgument(f"{model!r} has no policy; pass --policy W4A4 or --policy FILE")
    engine = o.engine_for(engine, output)
    mpq = models.load(model, loading)
    chosen = None if policy is None else models.read_policy(policy, mpq)
    train = models.loader(mpq, data, reading, train=True, seed=seed)
    measured = models.loader(mpq, val, reading, train=False) if val else None
    from ..train.processes import on_main

    with Run(output, settings, resume=resume) as run:
        if chosen is not None:
            if measured is not None:
                mpq.evaluate(measured)
            mpq.apply_policy(chosen, train, reestimate_norms=False)
        states: dict[str, Any] = {"checkpoint_dir": run.folder / "finetune", "resume": run.resume}
        tuning = FinetuneOptions.of(tuning, seed=seed, **states)
        mpq.finetune(train, tuning, engine=engine)
        if measured is not None:
            mpq.evaluate(measured)
        saved = on_main(lambda: mpq.save_pretrained(output))
    models.tell_corrupt(train, measured)
    _finish(mpq, output, saved, plot, as_json)


def _finish(mpq: Any, output: Path, saved: int, plot: Path | None, as_json: bool) -> None:
    """Write the plot and print the report of a folder that was just saved."""
    if not is_main():
        return
    if plot is not None:
        from ..plot import plot_policy

        plot_policy(mpq.graph, mpq.policy, plot)
        show.saved(plot)
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
