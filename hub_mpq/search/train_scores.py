"""Run a search strategy on a copy of a model, from data to scores that serve any number of budgets."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..adapters.restore_state import copied
from ..core import Budget, Candidates, Engine, IndicatorOptions, Indicators, LayerGraph
from ..errors import InvalidArgument
from ..nn.calibrate import sample_inputs
from ..nn.quantize import check_finite
from ..nn.rounded_weights import RoundedWeights
from ..tasks import Pair, TaskLike, task_of
from ..train.batches import first_batches, rereadable
from ..train.engine import accelerator_of
from ..train.finetune import Finetune
from ..train.loop import fit
from ..train.processes import share_samples, together
from .problem import searched_limits
from .strategy import build_strategy, strategy_named


def train_scores(
    model: nn.Module,
    graph: LayerGraph,
    norms: Mapping[str, str],
    train: Iterable[Any],
    candidates: Mapping[str, Candidates],
    options: IndicatorOptions | None = None,
    *,
    strategy: str = "limpq",
    strategy_options: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    base_bytes: int = 0,
    task: TaskLike = None,
    example: Any = None,
    engine: Engine | None = None,
    rounded: RoundedWeights | None = None,
) -> Indicators:
    """Score every searched layer by a registered strategy; `model` is not changed.

    If several processes were launched, each takes its part of the batches. Initial scales, gradients and scores are
    averaged over them, so all processes return the same scores.

    Args:
        model: The float model.
        graph: Its layers.
        norms: `{BatchNorm: layer whose output it normalizes}`.
        train: Batches: `(inputs, labels)`, dicts with labels, or inputs alone, for distillation.
        candidates: `{searched layer: its candidate bit-widths}`.
        options: Length of the search and other options; strategies that do not train ignore the length.
        strategy: Name of the strategy, or "source:name" of a custom one.
        strategy_options: Arguments of the strategy's constructor.
        budget: Target of strategies that train with a cost penalty.
        base_bytes: Bytes of the packed file apart from the searched layers.
        task: Task of the model; None to infer it from the model and the first batch.
        example: One input as the network takes it, which tells how many inputs a batch has.
        engine: Precision, memory, trackers.
        rounded: For a post-training strategy: the weights as they will be rounded, at all candidates.

    Returns:
        The scores, with their provenance.

    Raises:
        InvalidArgument: No layer is searched, the strategy does not have an option, the data cannot be used, or the
            weight of a layer has NaN or infinite values.
    """
    began = time.perf_counter()
    graph.check_layers()
    check_finite(model, graph.names)
    options = options or IndicatorOptions()
    name = strategy_named(strategy).name
    hooks = build_strategy(strategy, {**options.of_strategy(name), **(strategy_options or {})})
    hooks.seed, hooks.searched = options.seed, [layer.name for layer in graph.searched]
    hooks.rounded = rounded
    if hooks.trains and not hooks.weights_alone and any(c.float_inputs for c in candidates.values()):
        raise InvalidArgument(
            f"strategy {name!r} also searches the bit-widths of inputs; for weights alone use limpq or a strategy that "
            "does not train"
        )
    hooks.limits = searched_limits(graph, budget, base_bytes) if budget is not None else {}
    rereadable(train)
    source = hooks.loader(train)
    engine = Engine.of(engine)
    accelerator = accelerator_of(engine, hooks.stage or name, seed=options.seed)
    hooks.check_processes(accelerator.num_processes)
    batches = first_batches(source, hooks.batches, accelerator, options.seed)
    known = together(lambda: task_of(task, model, half(batches[0]), example))
    distill = options.distill
    if distill is None:
        distill = 1.0 if known.labels(batches[0]) is None else 0.0
    teacher = copied(model, model.parameters()).to(accelerator.device).eval().requires_grad_(False) if distill else None
    student = copied(model, model.parameters() if hooks.keeps_weights else ())
    student = student.requires_grad_(True).to(accelerator.device)
    hooks.loss = Finetune(
        task=known,
        lr=hooks.lr if options.lr is None else options.lr,
        scale_lr=hooks.scale_lr,
        weight_decay=hooks.weight_decay,
        smoothing=hooks.smoothing if options.smoothing is None else options.smoothing,
        teacher=teacher,
        distill=distill,
    )
    reading = [x.name for x in graph.searched if not (x.weight_only or candidates[x.name].float_inputs)]
    inputs = share_samples(sample_inputs(student, [half(batch) for batch in batches], known.forward, reading))
    searched = {layer.name: candidates[layer.name] for layer in graph.searched}
    hooks.attach(student, graph, searched, norms)
    hooks.calibrate(student, batches, inputs)
    provenance: dict[str, Any] = {"strategy": name, "sense": hooks.sense, "seed": options.seed}
    provenance |= {"task": known.name, "distill": distill, "processes": accelerator.num_processes, "steps": 0}
    if hooks.trains and options.steps != 0:
        log = fit(
            student,
            hooks,
            source,
            epochs=options.epochs,
            steps=options.steps,
            share=options.share,
            optimizer=hooks.optimizer,
            seed=options.seed,
            checkpoint_dir=options.checkpoint_dir,
            checkpoint_every=options.checkpoint_every,
            resume=options.resume,
            label=hooks.stage or name,
            accelerator=accelerator,
            engine=engine,
        )
        provenance |= {"steps": log.steps, "samples": log.samples, "step_seconds": round(log.step_seconds, 4)}
        provenance |= {"epoch_loss": [round(x, 5) for x in log.epoch_loss]}
    hooks.read_out(student, batches)
    found, inferred = hooks.indicators(student), hooks.inferred(student)
    provenance |= {"unit": hooks.unit, **hooks.details(student)}
    if inferred is not None:
        provenance["inferred"] = {layer: str(bits) for layer, bits in inferred.items()}
    provenance["seconds"] = round(time.perf_counter() - began, 3)
    return replace(found, provenance=provenance)


def half(batch: Any) -> Any:
    """Return the training half of a pair of batches, or the batch itself if it is not a pair."""
    return batch.train if isinstance(batch, Pair) else batch
