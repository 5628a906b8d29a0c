"""Run a strategy on a copy of a model: from data to scores that serve any number of budgets."""

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
    """Scores of every searched layer, by a strategy of the registry; `model` itself stays as it is.

    Launched as several processes, each takes its part of the batches; starts, gradients and what is read out are
    averaged over them, so that all return the same scores.

    Args:
        model: The float model.
        graph: Its layers.
        norms: {BatchNorm: layer whose output it reads}.
        train: Batches (inputs, labels), dicts with labels, or inputs alone, then by distillation.
        candidates: Widths of every searched layer.
        options: Length of the search and so on; scorers that do not train ignore the length.
        strategy: Name of the strategy, or "source:name" of one of the user's own.
        strategy_options: For the strategy's constructor.
        budget: What strategies with a penalty aim at while they train.
        base_bytes: Bytes of the packed file beside the searched layers.
        task: What the model is for; None to find out from it and the first batch.
        example: One input as the network takes it, which says how many inputs a batch has.
        engine: Precision, memory, trackers.
        rounded: For a post-training strategy: weights as they are going to be rounded, at all candidates.

    Raises:
        InvalidArgument: Nothing is searched, an option the strategy does not have, data it cannot use, or a layer's
            weight that holds NaN or infinite values.
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
        raise InvalidArgument(f"strategy {name!r} searches the widths of inputs too; weights alone: limpq or a scorer")
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
    """The training half of a pair of batches; a plain batch as it is."""
    return batch.train if isinstance(batch, Pair) else batch
