"""HubMPQ: a hub model together with its mixed-precision policy."""

from __future__ import annotations

import gc
import glob
import hashlib
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import adapters
from ._version import __version__
from .adapters import Source, norm_of
from .adapters.base import likely_example, placed
from .adapters.restore_state import copied
from .core import (
    FLOAT_BITS,
    Budget,
    Candidates,
    Engine,
    FinetuneOptions,
    IndicatorOptions,
    Indicators,
    LatencyTable,
    LayerBits,
    LayerGraph,
    Policy,
    SearchResult,
    Usage,
)
from .core.bits import GroupSizes, check_group_size, check_group_sizes
from .core.checks import MAX_SEED, number, seconds, whole
from .core.library import libraries
from .core.target import Target, targets
from .core.task import tasks
from .data import text_tokens
from .errors import HubMPQError, InvalidArgument
from .export import COMPRESSED_TENSORS, export, exportable
from .hub.cached import mended
from .hub.folder import read_folder_indicators, save_folder
from .hub.load import load_folder, load_resident
from .hub.origin import local_card
from .hub.preprocess import local_preprocess
from .hub.publish import publish
from .hub.pull import packed_folder, refuse_choices
from .hub.remote import check_repo_id
from .nn.fold import fold_notes
from .nn.packed import packed_layers
from .nn.packing import base_nbytes
from .nn.rounded_weights import RoundedWeights
from .nn.types import device_of
from .pack import Manifest, read_indicators, write_indicators
from .report import latency_line, measurements, report, warn_of_not_run
from .runtime import (
    Certificate,
    MetLatency,
    Timing,
    certify,
    check_table,
    measure_latency,
    meet_latency,
    policy_latency,
    runtime_here,
    to_runtime,
)
from .search.candidates import (
    CandidatesLike,
    check_one_grid,
    first_groups,
    resolve_candidates,
    weights_alone,
)
from .search.policy_search import inferred_policy, longest_header, pareto_front, search_policy, usage_of
from .search.scores import (
    Scores,
    candidates_of,
    equal_scores,
    expected_divergence,
    in_scored_groups,
    score_table,
    scored_candidates,
)
from .search.strategy import build_strategy, infers_widths, strategy_named
from .search.synthetic_data import synthetic_batch
from .search.train_scores import train_scores
from .search.validated_search import ScoredLayers, on_batches, search_measured
from .tasks import TaskLike, task_of
from .tasks.task import restored
from .train.apply_policy import apply_policy
from .train.batches import first_batch, rereadable
from .train.evaluate import evaluate
from .train.finetune import finetune
from .train.loop import TrainLog
from .train.norms import reestimate_batch_norm
from .train.perplexity import perplexity
from .train.processes import on_main, seeded, world
from .train.round_weights import BATCHES, check_rounding, chosen_rounding, digest_of, round_weights, weight_choices

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

Pins = Mapping[str, LayerBits | str | None]
OptionsLike = Mapping[str, Any]


class HubMPQ(nn.Module):
    """A timm or Hugging Face model (or any network) and, once searched for, its policy.

    Attributes:
        model: The network that runs: float until a policy is applied, then quantized.
        graph: Its layers.
        scores: What a search strategy found out about the layers; None until one has run.
        policy: The policy applied; None until there is one.
        result: The search that found it, with its proof; None for a policy that was given.
        metrics: {"float" | "quantized": figures}.
        history: How the quantized model came to be: {"search" | "finetune" | "latency" | "runtimes": facts}.
        seconds: {stage: wall time}.
        task: What the model is for, a `Task` or its name; None: found out from the model and the batches.
        target: The `Target` that policies are made for, or None.
    """

    def __init__(
        self,
        source: Source,
        *,
        task: TaskLike = None,
        fixed: Pins | None = None,
        weight_only: bool = False,
        tie_fused: bool = False,
        target: Target | str | None = None,
    ) -> None:
        super().__init__()
        self.target = targets.get(target) if isinstance(target, str) else target
        self.model = source.model
        self.source = source
        task_of(task, source.model)  # an unknown name is a mistake of this call
        self.task = task
        if weight_only and self.target is not None and not self.target.weight_only:
            raise InvalidArgument(
                f"target {self.target.name!r} computes in integers; weight_only=True keeps inputs float"
            )
        self.weight_only = weight_only or (self.target is not None and self.target.weight_only)
        self.graph: LayerGraph = source.graph
        self.graph = self._pinned(fixed)
        if tie_fused or (self.target is not None and self.target.tied):
            self.graph = self.graph.with_tied_inputs()
        self.policy: Policy | None = None
        self.scores: Indicators | None = None
        self.result: SearchResult | None = None
        self.metrics: dict[str, dict[str, float]] = {}
        self.history: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.home: Path | None = None  # the folder it was loaded from
        self._policy_graph: LayerGraph | None = None  # the graph with the pins of the policy that is applied
        # in a tuple: the float model is no submodule, or every state dict would hold it too
        self._float: tuple[nn.Module, ...] = (source.model,)

    @classmethod
    @torch.inference_mode(False)  # a model that a caller loads in inference mode is one like others
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        module: nn.Module | None = None,
        task: TaskLike = None,
        fixed: Pins | None = None,
        exclude: Iterable[str] = (),
        weight_only: bool = False,
        tie_fused: bool = False,
        target: Target | str | None = None,
        per_expert: bool = False,
        pretrained: bool = True,
        resident: str | None = None,
        runtime: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> HubMPQ:
        """Load a model, float or packed.

        Of a published packed model only its config, packed weights, indicators and preprocessing are fetched; pinned
        to a commit that is in the cache, nothing is asked of the network.

        Args:
            model_id: A timm name, a Hugging Face id, "hf-hub:…", a local folder, or what save_pretrained or push_to_hub
                wrote.
            module: The network itself, for a packed model that no hub can build. A copy of it is filled, in the dtypes
                that the model was saved in.
            task: What the model is for: a name such as "regression", or a `hub_mpq.Task`; None to find out from the
                model and the batches.
            fixed: {name or pattern: "W8A8" or None} changes which layers keep their widths.
            exclude: Patterns of layers to leave float.
            weight_only: All inputs stay float, fixed layers' too.
            tie_fused: Layers of one module that read one input (q, k, v; gate, up) share the weight width, as runtimes
                that fuse them (vLLM) need.
            target: What policies are made for. "onednn", "openvino", "onnxruntime", "bit_serial": a runtime, at widths
                that it computes in integers exactly on every x86 CPU, so that W7A8 stands for W8A8. "vllm"
                (compressed-tensors), "gguf" (llama.cpp): weights alone are quantized. Or a `Target`. Layers take
                what its menu has of what is asked for, its ties hold, and `size` is in bytes of its file where these
                are others than the packed file's. None: hub_mpq's own file.
            per_expert: Each expert of a mixture-of-experts model has widths and scores of its own. False: one decision
                for each stack of experts. A packed model has what it was made with.
            pretrained: Fetch the published weights.
            resident: Of a packed model of transformers: "packed" or "float", the form in which weights are kept in
                memory by layers that only run, see `hub_mpq.set_resident`. None: float weights behind quantizers, which
                can be trained.
            runtime: Of a packed model: what runs it, see `to_runtime`; "auto" for the best here. The model then
                only runs. None: float weights behind quantizers, which can be trained, saved and published.
            revision: Branch, tag or commit.
            token: As for huggingface_hub.
            local_files_only: Ask nothing of the network.
            kwargs: Go to timm or transformers, such as checkpoint_path.

        Raises:
            InvalidArgument: The model is packed, and it is said what of it is to be quantized; or resident= or runtime=
                is of another model.
            HubMPQError: The model cannot be had, or the runtime cannot be used here.
        """
        where: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
        folder = packed_folder(model_id, **where) if pretrained else None
        if folder is not None:
            choices = {"fixed": fixed, "exclude": tuple(exclude), "weight_only": weight_only}
            refuse_choices(model_id, **choices, tie_fused=tie_fused, target=target, per_expert=per_expert)
            load = partial(cls._of_folder, folder, module, task, resident, kwargs)
            out = mended(folder, load, token=token, offline=local_files_only)
            if runtime is not None:
                out.model = out.to_runtime(runtime)
                out.source = replace(out.source, model=out.model)  # the other one's memory is free again
            return out
        for name, value in {"resident": resident, "runtime": runtime}.items():
            if value is not None:
                raise InvalidArgument(f"{name}= is for packed models, and {str(model_id)!r} is none")
        kwargs |= {key: value for key, value in {**where, "per_expert": per_expert}.items() if value}
        source = adapters.load(str(model_id), pretrained=pretrained, exclude=exclude, **kwargs)
        warn_of_not_run(source.graph)
        out = cls(source, task=task, fixed=fixed, weight_only=weight_only, tie_fused=tie_fused, target=target)
        if Path(model_id).is_dir():
            out.home = Path(model_id)
            out.scores = read_folder_indicators(model_id)
        return out

    @classmethod
    @torch.inference_mode(False)
    def from_module(
        cls,
        net: nn.Module,
        example_input: Any,
        *,
        model_id: str | None = None,
        task: TaskLike = None,
        fixed: Pins | None = None,
        exclude: Iterable[str] = (),
        weight_only: bool = False,
        tie_fused: bool = False,
        target: Target | str | None = None,
        per_expert: bool = False,
    ) -> HubMPQ:
        """Take any network; it stays float itself.

        Args:
            net: The network.
            example_input: One batch as it takes it.
            model_id: A name for it; the class's by default.
            task, fixed, exclude, weight_only, tie_fused, target, per_expert: As in `from_pretrained`.
        """
        source = adapters.from_module(net, example_input, model_id=model_id, exclude=exclude, per_expert=per_expert)
        warn_of_not_run(source.graph)
        return cls(source, task=task, fixed=fixed, weight_only=weight_only, tie_fused=tie_fused, target=target)

    @classmethod
    def _of_folder(
        cls, folder: Path, module: nn.Module | None, task: TaskLike, resident: str | None, kwargs: OptionsLike
    ) -> HubMPQ:
        if resident is None:
            source, manifest = load_folder(folder, module, kwargs)
        else:
            source, manifest = load_resident(folder, resident, kwargs)
        target = manifest.provenance.get("target")
        out = cls(
            source,
            task=restored(manifest.provenance.get("task")) if task is None else task,
            target=target if target in targets else None,
        )
        out.policy, out._float, out.home = manifest.policy, (), folder
        out.scores = read_folder_indicators(folder)
        out.metrics = {k: dict(v) for k, v in manifest.provenance.get("metrics", {}).items()}
        out.history = {
            k: dict(v) for k, v in manifest.provenance.items() if k in ("search", "finetune", "latency", "runtimes")
        }
        if resident is None:  # transformers itself loaded the other
            out._tell_transformers()
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's own forward."""
        return self.model(*args, **kwargs)

    @property
    def float_model(self) -> nn.Module:
        """The model before quantization. Raises HubMPQError for one loaded from packed weights: it has none."""
        if not self._float:
            raise HubMPQError(
                "this model was loaded from packed weights and has no float weights to start from; "
                f"load its base model {self.graph.model_id!r} to quantize anew"
            )
        return self._float[0]

    @property
    def indicators(self) -> Indicators | None:
        """`scores`, by the name that published cards use."""
        return self.scores

    @indicators.setter
    def indicators(self, value: Indicators | None) -> None:
        self.scores = value

    # scores

    def train_indicators(
        self,
        train: Iterable[Any],
        options: IndicatorOptions | OptionsLike | None = None,
        *,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        task: TaskLike = None,
        engine: Engine | OptionsLike | None = None,
        **changes: Any,
    ) -> Indicators:
        """Learn every layer's importance at every candidate width by LIMPQ; it serves every later budget.

        Arguments as in `train_scores`.
        """
        return self.train_scores(
            train, options, candidates=candidates, fixed=fixed, task=task, engine=engine, **changes
        )

    def train_scores(
        self,
        train: Iterable[Any],
        options: IndicatorOptions | OptionsLike | None = None,
        *,
        strategy: str = "limpq",
        strategy_options: OptionsLike | None = None,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        budget: Budget | OptionsLike | None = None,
        task: TaskLike = None,
        engine: Engine | OptionsLike | None = None,
        **changes: Any,
    ) -> Indicators:
        """Let a strategy score the layers; later searches use the scores, which are stored with the model.

        Args:
            train: Batches (inputs, labels), dicts with labels, or inputs alone, then by distillation. Several inputs
                are ((first, second), labels). Tensors or arrays; labels also as lists.
            options: Length, learning rates and so on.
            strategy: "limpq", "dq", "ebs", "seam", "bsq", "gradient", "hessian", "mse", "kl", or one of your own,
                "file.py:name".
            strategy_options: For the strategy's constructor.
            candidates: Widths that layers may take.
            fixed: {name or pattern: "W8A8" or None} for this call.
            budget: What a strategy with a penalty aims at.
            task: What the model is for; None for `self.task`, or to find out.
            engine: Precision, memory, trackers.
            changes: Single options by name, in place of those of `options`.
        """
        build_strategy(strategy, strategy_options)  # what it refuses must not cost work first
        return self._train_scores(
            self._pinned(fixed),
            train,
            IndicatorOptions.of(options, **changes),
            candidates,
            strategy=strategy,
            strategy_options=strategy_options,
            budget=Budget.of(budget, {}),
            task=task,
            engine=Engine.of(engine),
        )

    def _train_scores(
        self,
        graph: LayerGraph,
        train: Iterable[Any],
        options: IndicatorOptions,
        candidates: CandidatesLike,
        *,
        strategy: str,
        budget: Budget | None,
        task: TaskLike,
        **more: Any,
    ) -> Indicators:
        with torch.no_grad():
            norms = norm_of(self.float_model, self._example)
        self.scores = train_scores(
            self.float_model,
            graph,
            norms,
            train,
            self._candidates(graph, candidates),
            options,
            strategy=strategy,
            budget=budget,
            base_bytes=self._base_bytes(graph),
            **self._told(task),
            **more,
        )
        cls = strategy_named(strategy)
        self.seconds[cls.stage or cls.name] = self.scores.provenance["seconds"]
        return self.scores

    def score_table(self, alpha: float | None = None, candidates: CandidatesLike = None) -> tuple[Scores, float]:
        """({searched layer: {widths: score}}, α): what the solver adds up; `scores.sense` tells which way is better."""
        _check_numbers(alpha=alpha)
        chosen = self._scored_candidates(self.graph, candidates)
        return score_table(self._scores(), self.graph, chosen, alpha, weight_only=self.weight_only)

    def _scored_candidates(self, graph: LayerGraph, value: CandidatesLike) -> Mapping[str, Candidates] | None:
        """Candidates of a search from the scores that are there; None for all that have a score."""
        graph.check_layers()
        scores, searched = self._scores(), {layer.name for layer in graph.searched}
        pairs = {name: row for name, row in scores.pairs.items() if name in searched}
        if value is None:
            if self.target is None:
                return None
            value = candidates_of(pairs) if pairs else scored_candidates(scores, graph, weight_only=self.weight_only)
        return self._candidates(graph, in_scored_groups(resolve_candidates(graph, value), pairs))

    def _scores(self) -> Indicators:
        """The scores; HubMPQError where there are none."""
        if self.scores is None:
            raise HubMPQError("there are no indicators yet; call train_indicators first, or quantize")
        return self.scores

    # search

    def search(
        self,
        budget: Budget | OptionsLike | None = None,
        *,
        alpha: float | None = None,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        time_limit: float | None = None,
        validate: Iterable[Any] | None = None,
        validate_seconds: float | None = None,
        **limits: Any,
    ) -> SearchResult:
        """The policy with the best sum of scores within a budget, which is proved; with `validate`, the policy that
        measures best. Does not change the model.

        Args:
            budget: A Budget; or name its limits (bitops=, size=, compression=, …, see `Budget`). A level ("W4") stands
                for the first group size of the candidates.
            alpha: Multiplier for LIMPQ's weight indicators; None: 1 for scores in one unit, else the sums are balanced.
            candidates: Widths that layers may take; None for all that have a score. Where scores are of weights in
                groups or with zero points alone, widths stand for these.
            fixed: {name or pattern: "W8A8" or None} for this call.
            time_limit: Seconds; past them the best policy so far, with its gap.
            validate: Batches; labels are not looked at. The optimum, uniform (the dearest level within the budget) and
                a few others are measured on up to 2,048 samples, or 4,096 tokens, and the optimum is returned unless
                another one is measurably better, see `hub_mpq.search.validate`.
            validate_seconds: What that may take; None: a quarter of what the scores took, at least 30.

        Raises:
            InfeasibleBudget: No policy meets the budget; it reports the minimum of each limit.
        """
        _check_numbers(alpha=alpha, time_limit=time_limit, validate_seconds=validate_seconds)
        graph = self._pinned(fixed)
        wanted = self._budget_here(Budget.of(budget, limits) or Budget(), graph)
        scored = self._scored(graph, alpha, self._scored_candidates(graph, candidates))
        wanted = wanted.with_groups(*first_groups(scored.candidates))
        result = scored.optimum(wanted, time_limit)
        if validate is not None:
            finish = on_batches(scored, self.float_model, validate, validate_seconds, **self._told(None))
            result = finish(result, wanted)
        self._note(result)
        return result

    def _scored(
        self, graph: LayerGraph, alpha: float | None, candidates: Mapping[str, Candidates] | None
    ) -> ScoredLayers:
        """What a search needs beside the budget."""
        graph.check_layers()
        scores = self._scores()
        table, used = score_table(scores, graph, candidates, alpha, weight_only=self.weight_only)
        widths = candidates_of(table) if candidates is None else candidates
        return ScoredLayers(graph, scores, table, used, widths, self._base_bytes(graph, table))

    def _note(self, *results: SearchResult) -> None:
        """Keep the seconds of searches, and warn where the scores predict measurements poorly."""
        self.seconds["search"] = sum(result.seconds for result in results)
        measured = [result.validation.seconds for result in results if result.validation is not None]
        self.seconds.pop("validate", None)
        if sum(measured):
            self.seconds["validate"] = sum(measured)
        poor = [result.check for result in results if result.check is not None and not result.check.good]
        if poor:
            warnings.warn(f"the scores predict poorly what policies measure: {poor[0]}", stacklevel=3)

    def check_reachable(
        self,
        budget: Budget | OptionsLike | None = None,
        *,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        strategy: str | None = None,
        **limits: Any,
    ) -> None:
        """Raise InfeasibleBudget when no policy of the candidates meets the budget; needs no scores.

        Args:
            budget: As in `search`, and so are candidates, fixed and limits.
            strategy: The one that is going to search; None: with the scores that are there, if any.
        """
        graph = self._pinned(fixed)
        wanted = self._budget_here(Budget.of(budget, limits) or Budget(), graph)
        if self.scores is not None and (strategy is None or self._serves(strategy, graph)):
            scored = self._scored(graph, None, self._scored_candidates(graph, candidates))
            scored.optimum(wanted.with_groups(*first_groups(scored.candidates)))
        else:
            chosen = self._candidates(graph, candidates)
            self._check_reachable(graph, wanted.with_groups(*first_groups(chosen)), chosen)

    def _check_reachable(self, graph: LayerGraph, budget: Budget, candidates: Mapping[str, Candidates]) -> None:
        table = equal_scores(graph, candidates)
        search_policy(graph, table, budget, base_bytes=self._base_bytes(graph, table))

    def pareto(
        self,
        limit: str = "bitops",
        points: int = 20,
        budget: Budget | OptionsLike | None = None,
        *,
        alpha: float | None = None,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        time_limit: float | None = None,
        validate: Iterable[Any] | None = None,
        validate_seconds: float | None = None,
        **limits: Any,
    ) -> list[SearchResult]:
        """Best policies along one limit, with `validate` those that measure best.

        Args:
            limit: The limit to run over.
            points: How many budgets between the least and the greatest.
            budget: Other limits that hold at each point, whole or by name, as in `search`.
            alpha, candidates, fixed: As in `search`.
            time_limit: Seconds for all points; past them the best policies so far, with their gaps.
            validate: As in `search`.
            validate_seconds: As in `search`, of each point.
        """
        whole("points", points, 2, 10_000)
        _check_numbers(alpha=alpha, time_limit=time_limit, validate_seconds=validate_seconds)
        graph = self._pinned(fixed)
        scored = self._scored(graph, alpha, self._scored_candidates(graph, candidates))
        others = Budget.of(budget, limits)
        if others is not None:
            others = self._budget_here(others, graph).with_groups(*first_groups(scored.candidates))
        if limit == "size" and self.target is not None and self.target.own_size:
            raise InvalidArgument(
                f"a front over size is of the packed file, not of the {self.target.own_size}: run over weight_bits"
            )
        finish = None
        if validate is not None:
            finish = on_batches(scored, self.float_model, validate, validate_seconds, **self._told(None))
        scores = scored.indicators
        results = pareto_front(
            scored.graph,
            scored.table,
            limit=limit,
            points=points,
            base_bytes=scored.base_bytes,
            others=others,
            sense=scores.sense,
            strategy=scores.strategy,
            seed=scores.seed,
            time_limit=time_limit,
            finish=finish,
        )
        self._note(*results)
        return results

    # the quantized model

    def apply_policy(
        self,
        policy: Policy | SearchResult | LayerBits | str,
        calibration: Iterable[Any] | None = None,
        *,
        batches: int = 4,
        per_channel: bool = True,
        group_size: int | None = None,
        symmetric: bool = True,
        rounding: str | None = None,
        reestimate_norms: bool = True,
        task: TaskLike = None,
    ) -> HubMPQ:
        """Quantize a copy of the float model at a policy; returns self.

        Args:
            policy: A Policy, what `search` returned, or a level ("W4A4", "W4g128A8") for all searched layers.
            calibration: Batches; None for synthetic inputs.
            batches: How many of them scales of inputs are calibrated on.
            per_channel: One weight scale per output channel, else one per tensor.
            group_size: Weights of a row that share a scale, in searched layers for which the policy names none: 32, 64,
                128. None: no groups. Layers other than linear ones, embeddings and experts have none.
            symmetric: False: zero points beside the scales of the same layers.
            rounding: "gptq" or "nearest", see `hub_mpq.train.round_weights`, on up to 16 batches. None: "gptq" for a
                policy that quantizes weights alone, with calibration data; else nearest.
            reestimate_norms: Re-estimate BatchNorm statistics too, on up to 16 batches of `calibration`.
            task: What the model is for, which says what of a batch is an input; None for `self.task`, or to find out.
        """
        whole("batches", batches, 1)
        check_group_size(group_size)
        check_rounding(rounding)
        if isinstance(policy, SearchResult):
            policy = policy.policy
        if not isinstance(policy, Policy):
            policy = self._uniform(policy, group_size, symmetric)
        policy.check(self.graph)
        policy = policy.with_groups(self.graph, group_size, symmetric)
        if self.target is not None:
            self.target.check(self.graph, policy)
        rounding = chosen_rounding(rounding, policy, calibration, per_channel)
        return self._quantize_at(
            policy, self.graph, calibration, batches, per_channel, reestimate_norms, task, rounding=rounding
        )

    def _quantize_at(
        self,
        policy: Policy,
        graph: LayerGraph,
        calibration: Iterable[Any] | None,
        batches: int,
        per_channel: bool,
        reestimate_norms: bool,
        task: TaskLike = None,
        **weights: Any,
    ) -> HubMPQ:
        policy.check(graph)
        graph = graph.at(policy.bits)
        model = copied(self.float_model)
        told = self._told(task)
        data: Any
        if calibration is None:
            data = [synthetic_batch(self.float_model, self._example)]
        else:
            data = seeded(calibration)
            if isinstance(data, Iterator):  # read once for scales and norms alike
                data = list(islice(data, max(16, batches)))
        apply_policy(model, graph, policy, data, limit=batches, per_channel=per_channel, **told, **weights)
        if calibration is not None and reestimate_norms:
            reestimate_batch_norm(model, data, limit=16, **told)
        cyclic = hasattr(self.model, "hf_quantizer")  # what `_tell_transformers` has told holds the model itself
        self.model, self.policy, self._policy_graph = model.eval(), policy, graph
        if cyclic:
            gc.collect()
        self.result, self.history = None, {}
        self.metrics.pop("quantized", None)
        self._tell_transformers()
        return self

    def finetune(
        self,
        train: Iterable[Any],
        options: FinetuneOptions | OptionsLike | None = None,
        *,
        task: TaskLike = None,
        engine: Engine | OptionsLike | None = None,
        **changes: Any,
    ) -> TrainLog:
        """Train the quantized model in place.

        Args:
            train: Batches as in `train_scores`.
            options: Length, learning rates and so on.
            task: What the model is for; None for `self.task`, or to find out.
            engine: Precision, memory, compiler, trackers.
            changes: Single options by name, in place of those of `options`.
        """
        chosen = FinetuneOptions.of(options, **changes)
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy first")
        if any(packed_layers(self.model)):
            raise HubMPQError("packed layers are not trained; load the folder without resident=")
        self._check_whole()
        teacher = self._float[0] if self._float else None
        self.metrics.pop("quantized", None)  # they were the model's before
        log = finetune(self.model, train, chosen, teacher=teacher, engine=engine, **self._told(task))
        self.seconds["finetune"] = log.seconds
        self.history.pop("runtimes", None)  # so were these
        self.history["finetune"] = {**chosen.changed(), "steps": log.steps, "samples": log.samples}
        return log

    def evaluate(self, loader: Iterable[Any], *, task: TaskLike = None) -> dict[str, Any]:
        """The task's metrics, or fidelity to the float model when there are no labels.

        Args:
            loader: Batches as in `train_scores`.
            task: What the model is for; None for `self.task`, or to find out.

        Returns:
            {metric: value}, with the task's name as "task" and the number of "samples".
        """
        reference = self._float[0] if self._float else None
        figures = evaluate(self.model, loader, reference=reference, **self._told(task))
        self.metrics["quantized" if self.policy is not None else "float"] = figures
        return figures

    def perplexity(
        self, text: str | Path | Any, *, context: int | None = None, stride: int | None = None, task: TaskLike = None
    ) -> dict[str, Any]:
        """Perplexity by token of a causal language model, see `hub_mpq.train.perplexity`.

        Args:
            text: A text file, a data set ("hfds/NAME[:CONFIG][:SPLIT]"), see `hub_mpq.data.text.read_text`, which the
                model's own tokenizer cuts into tokens; or token ids.
            context: Tokens of a window; None: 1,024, or what the model takes if that is less.
            stride: Tokens from one window to the next; None: `context`.
            task: What the model is for; None for `self.task`, or to find out.

        Returns:
            {metric: value} with "perplexity", the number of "tokens", "context" and "stride".
        """
        for name, value, low in (("context", context, 2), ("stride", stride, 1)):
            if value is not None:
                whole(name, value, low)
        told = self._told(task)
        ids = text_tokens(text, self.source, self.model, told["task"]) if isinstance(text, (str, Path)) else text
        figures = perplexity(self.model, ids, context=context, stride=stride, **told)
        self.metrics["quantized" if self.policy is not None else "float"] = figures
        return figures

    def to_runtime(self, name: str = "auto", *, example: Any = None, allow_inexact: bool = False) -> nn.Module:
        """The quantized model on a runtime: a module with the same forward that computes in integers.

        Args:
            name, allow_inexact: As in `hub_mpq.to_runtime`.
            example: One batch of the sizes that speed matters at; None: the model's example input, one sample.

        Returns:
            The module; its `runtime_layers` says what became of each layer.

        Raises:
            InvalidArgument: An unknown runtime, or there is no policy yet.
            HubMPQError: The runtime cannot be used here, or what it computes is not the same model.
        """
        self._check_whole()
        example = self._example if example is None else example
        if not isinstance(example, Tensor) and not example:  # of a network that was passed to from_pretrained
            example = likely_example(self.model, self.graph.input_shape)
        return to_runtime(self.model, name, example, allow_inexact=allow_inexact)

    def certify(self, module: nn.Module, batches: Iterable[Any], *, task: TaskLike = None) -> Certificate:
        """Measure whether a module of `to_runtime` is the same model as this one.

        Args:
            module: What `to_runtime` made of this model.
            batches: Batches as in `evaluate`, with labels or without. Their first is what the layers are compared on.
            task: As in `evaluate`.

        Returns:
            Per layer the largest error, rounding flips and saturations, and the metrics of the task; it is recorded and
            stands in the card that `push_to_hub` writes.
        """
        self._check_whole()
        found = certify(self.model, module, batches, **self._told(task))
        self.history.setdefault("runtimes", {})[found.runtime] = found.summary()
        return found

    def quantize(
        self,
        budget: Budget | OptionsLike | None = None,
        *,
        train: Iterable[Any] | None = None,
        val: Iterable[Any] | None = None,
        epochs: float = 1,
        steps: int | None = None,
        strategy: str | None = None,
        strategy_options: OptionsLike | None = None,
        indicators: Indicators | None = None,
        indicator_options: IndicatorOptions | OptionsLike | None = None,
        alpha: float | None = None,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        task: TaskLike = None,
        per_channel: bool = True,
        group_size: GroupSizes = None,
        symmetric: bool = True,
        rounding: str | None = None,
        seed: int = 0,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        finetune_options: FinetuneOptions | OptionsLike | None = None,
        engine: Engine | OptionsLike | None = None,
        validate: bool | Iterable[Any] = True,
        validate_seconds: float | None = None,
        **limits: Any,
    ) -> HubMPQ:
        """Scores, policy, quantizers in, fine-tuned: all in one call; returns self.

        Args:
            budget: As in `search`, whole or by the names of its limits. A strategy that infers widths (DQ, BSQ) needs
                none.
            train: Batches to train on; without any, stored indicators or a data-free calibration serve, with one
                warning.
            val: Labelled batches to measure on, before and after.
            epochs, steps: Length of fine-tuning (epochs=0: calibration only).
            strategy, strategy_options: As in `train_scores`; by default the one that made `indicators`, else "limpq",
                or "gradient" where weights are rounded by GPTQ.
            indicators: Scores learned before.
            indicator_options: As in `train_scores`.
            alpha, candidates: As in `search`.
            fixed: {name or pattern: "W8A8" or None} for this policy.
            task: What the model is for; None for `self.task`, or to find out.
            per_channel: One weight scale per output channel, else one per tensor.
            group_size: Weights of a row that share a scale: 32, 64, 128; several, such as [None, 128, 32], for the
                solver to choose from (then weights are rounded before they are scored). A level in the budget ("W4")
                stands for the first of them. None: one scale per output channel.
            symmetric: False: zero points beside the scales.
            rounding: "gptq" or "nearest": round weights on `train` before they are scored, see
                `hub_mpq.train.round_weights`. None: "gptq" where weights alone are quantized, on `train`, without
                fine-tuning.
            seed: Of every stage whose options name no other.
            checkpoint_dir, resume: Go on after an interruption.
            finetune_options: As in `finetune`.
            engine: How the trainings run (precision, memory, trackers).
            validate: Measure policies before one is taken, as in `search`, with weight scales and norms estimated on
                `train`. True: on `val`, whose labels are not looked at, or without it on training batches that no score
                was read from, where there are any. Batches: on these. False: the optimum of the scores is taken.
            validate_seconds: As in `search`.
        """
        whole("seed", seed, 0, MAX_SEED)
        group_size = check_group_sizes(group_size)
        _check_numbers(alpha=alpha, validate_seconds=validate_seconds)
        if train is not None:
            rereadable(train)
        wanted = Budget.of(budget, limits)
        learning = IndicatorOptions.of(indicator_options, {"seed": seed, "resume": resume})
        shared = {"epochs": epochs, "steps": steps, "seed": seed, "resume": resume}
        tuning = FinetuneOptions.of(finetune_options, shared)
        tuned = train is not None and (tuning.epochs > 0 if tuning.steps is None else tuning.steps > 0)
        engine = Engine.of(engine)
        check_rounding(rounding)
        if tuned and engine.fsdp:
            raise InvalidArgument("fsdp trains indicators; fine-tuning runs without it, so give epochs=0")
        if indicators is not None and strategy and strategy_named(strategy).name != indicators.strategy:
            raise InvalidArgument(f"the indicators are of strategy {indicators.strategy!r}, not of {strategy!r}")
        graph = self._pinned(fixed)
        if candidates is None:
            held = None if self.weight_only else self.scores
            candidates = self._learned_widths(graph, held if indicators is None else indicators, strategy)
        candidates = self._candidates(graph, candidates, group_size, symmetric)
        if wanted is not None:
            wanted = self._budget_here(wanted, graph)
            if "latency" in wanted.limits:  # what cannot measure must not cost a training first
                runtime_here(wanted.latency_table.runtime)  # type: ignore[union-attr]
            wanted = wanted.with_groups(*first_groups(candidates, group_size))
        alone = weights_alone(graph, candidates)
        if rounding is None and alone and per_channel and train is not None and not tuned and world()[1] == 1:
            rounding = "gptq"
        if rounding is not None and (train is None or world()[1] > 1 or not per_channel):
            raise InvalidArgument(
                f"rounding={rounding!r} needs train=, one process, and a scale for each output channel or group"
            )
        strategy = strategy or (indicators.strategy if indicators is not None else "gradient" if rounding else "limpq")
        if wanted is None and (indicators.inferred is None if indicators is not None else not infers_widths(strategy)):
            Budget()  # none where one is needed must not cost a training first
        if indicators is not None:
            self.scores = indicators
        learned = indicators is not None or self._serves(strategy, graph)
        if strategy_options or not learned:
            build_strategy(strategy, strategy_options)
        if wanted is not None and learned:
            self._scored(graph, None, candidates).optimum(wanted)
        elif wanted is not None:
            self._check_reachable(graph, wanted, candidates)
        if not learned and strategy_named(strategy).trains:
            check_one_grid(candidates)
        if val is not None:
            rereadable(val, "val")
            if "float" not in self.metrics and self._labelled(val, task):
                self.metrics["float"] = evaluate(self.float_model, val, **self._told(task))
        rounded = None
        if rounding is not None:
            rounded = self._rounded(graph, candidates, train, rounding, checkpoint_dir, resume, learning.seed, task)
        kept = None
        if checkpoint_dir and not learned:
            of = [strategy, strategy_options, str(learning.changed()), str(candidates), rounding, graph.digest]
            of.append(digest_of(self.float_model.state_dict()))
            cls = strategy_named(strategy)
            of += [] if cls.learned_once or not cls.trains or wanted is None else [str(wanted)]
            kept = Path(checkpoint_dir) / f"scores-{_mark(of)}.safetensors"
            if resume and kept.is_file():
                self.scores, learned = read_indicators(kept), True
        if not learned:
            if checkpoint_dir:
                learning = learning.filled(
                    checkpoint_dir=_states_of(checkpoint_dir, strategy, strategy_options, wanted)
                )
            self._learn(
                graph,
                train,
                learning,
                candidates,
                strategy=strategy,
                strategy_options=strategy_options,
                budget=wanted,
                task=task,
                engine=engine,
                rounded=rounded,
            )
            if kept is not None:
                on_main(partial(write_indicators, kept, self._scores()))
        # of several processes one searches and measures: a time limit could end them at other policies
        result = met = None
        if wanted is not None:
            scored = self._scored(graph, alpha, candidates)
            more = {"seconds": validate_seconds, "per_channel": per_channel, "rounded": rounded, **self._told(task)}
            search = partial(search_measured, scored, self.float_model, validate=validate, train=train, val=val, **more)
            if "latency" in wanted.limits:
                met = on_main(partial(self._meet_latency, scored, search, wanted))
                result = met.result
            else:
                result = on_main(partial(search, budget=wanted))
            self._note(result)
        policy = result.policy if result else inferred_policy(graph, self._scores(), candidates)
        # fine-tuning starts from the float BatchNorm (LIMPQ) and re-estimates at its end
        if rounded is not None and result is None:  # inferred widths
            rounded = None
        self._quantize_at(policy, graph, train, 4, per_channel, not tuned, task, rounded=rounded)
        self.result = result
        if met is not None:
            self.history["latency"] = met.facts()
        self._tell_transformers()
        if train is not None and tuned:
            if checkpoint_dir:
                # a state of other widths, or of weights that were rounded otherwise, would load without a word
                of = [policy.to_dict(), rounding]
                tuning = tuning.filled(checkpoint_dir=Path(checkpoint_dir) / f"finetune-{_mark(of)}")
            self.finetune(train, tuning, task=task, engine=engine)
        if val is not None:
            self.evaluate(val, task=task)
        return self

    def measure_latency(
        self, runtime: str = "onednn", *, batch_size: int = 1, threads: int = 1, candidates: CandidatesLike = None
    ) -> LatencyTable:
        """Time each layer on a runtime, at the widths that it computes in integers and in float, and the whole model.

        The table is what `latency=` is met by: `quantize(latency="5ms", latency_table=table)`. It holds for this
        machine, runtime, batch, threads and input size. `hub_mpq.write_latency_table` writes it.

        Args:
            runtime: As in `to_runtime`; not "auto".
            batch_size: Samples in a call.
            threads: Threads that a call may use.
            candidates: Widths to time on a runtime whose time depends on them (bit_serial); None: 1 to 8. Others
                compute all widths by one kernel, which is timed once.

        Raises:
            InvalidArgument: A number is below 1, or an unknown runtime.
            HubMPQError: The runtime cannot be used here, or the model was loaded from packed weights.
        """
        whole("batch_size", batch_size, 1)
        whole("threads", threads, 1, 1024)
        more: dict[str, Any] = {}
        if candidates is not None:
            chosen = resolve_candidates(self.graph, candidates).values()
            fixed = [x.fixed for x in self.graph if x.fixed is not None]
            more["widths"] = {LayerBits(w, a) for c in chosen for w in c.weight for a in c.activation}.union(fixed)
        return measure_latency(
            *(self._on_cpu(), self.graph, self.source.example),
            **{"runtime": runtime, "batch_size": batch_size, "threads": threads, **more},
        )

    def _on_cpu(self) -> nn.Module:
        """The float model where runtimes need it."""
        net = self.float_model
        return net if device_of(net).type == "cpu" else copied(net).cpu()

    def _meet_latency(self, scored: ScoredLayers, search: Any, budget: Budget) -> MetLatency:
        """The table is corrected by the optimum's time first: measuring policies for their accuracy takes longer."""
        net, known = self._on_cpu(), {}
        table: Any = budget.latency_table
        example = placed(self.source.example, net)

        def measure(policy: Policy) -> Timing:
            key = tuple(sorted(policy.bits.items()))
            if key not in known:
                known[key] = policy_latency(net, scored.graph, table, example, policy)
            return known[key]

        began = time.perf_counter()
        met = meet_latency(scored.optimum, budget, measure)
        final = meet_latency(lambda corrected: search(budget=corrected), met.budget, measure)
        self.seconds["latency"] = time.perf_counter() - began
        return replace(final, searches=met.searches + final.searches)

    def _rounded(
        self,
        graph: LayerGraph,
        candidates: Mapping[str, Candidates],
        train: Iterable[Any],
        rounding: str,
        checkpoint_dir: str | Path | None,
        resume: bool,
        seed: int,
        task: TaskLike,
    ) -> RoundedWeights:
        """The weights at all candidates, rounded on the batches that scores are read from."""
        began = time.perf_counter()
        found = round_weights(
            self.float_model,
            graph,
            weight_choices(graph, candidates),
            islice(seeded(train, seed=seed), BATCHES),
            rounding=rounding,
            folder=None if checkpoint_dir is None else Path(checkpoint_dir) / "rounded",
            resume=resume,
            **self._told(task),
        )
        self.seconds["rounding"] = time.perf_counter() - began
        return found

    def _labelled(self, loader: Iterable[Any], task: TaskLike) -> bool:
        """Whether the first batch has labels."""
        first = first_batch(loader)
        told = self._told(task)
        return task_of(told["task"], self.float_model, first, told["example"]).labels(first) is not None

    def _serves(self, strategy: str, graph: LayerGraph) -> bool:
        """Whether the scores that are there are what a strategy would learn once and for all budgets."""
        found = self.scores
        if found is None or found.strategy != strategy or not strategy_named(strategy).learned_once:
            return False
        return {layer.name for layer in graph.searched} <= {*found.weight, *found.pairs}

    def _learned_widths(self, graph: LayerGraph, scores: Indicators | None, strategy: str | None) -> CandidatesLike:
        """With a target: what scores of single widths were learned for, which may be less than its menu; else None."""
        if self.target is None or scores is None or strategy not in (None, scores.strategy):
            return None
        if not {layer.name for layer in graph.searched} <= set(scores.weight):
            return None
        return scored_candidates(scores, graph, weight_only=self.weight_only)

    def _learn(
        self, graph: LayerGraph, train: Any, options: IndicatorOptions, candidates: CandidatesLike, **more: Any
    ) -> None:
        """Scores for `quantize`, from data or, with one warning, without."""
        if train is None:
            warnings.warn(
                "no data and no stored indicators: searching and calibrating on synthetic inputs; pass train= for a "
                "policy that was learned",
                stacklevel=3,
            )
            data = [synthetic_batch(self.float_model, self._example, options.seed)]
            if strategy_named(more["strategy"]).learned_once:
                options = IndicatorOptions.of(options, steps=0, checkpoint_dir=None, resume=False)
        else:
            first_batch(train)
            data = train
        self._train_scores(graph, data, options, candidates, **more)

    # what a policy costs

    def usage(self, policy: Policy | LayerBits | str | None = None) -> Usage:
        """Whole-model cost of a policy (default: the one applied)."""
        graph, model = self.graph, None
        if policy is None:
            policy, graph, model = self.policy, self._policy_graph or self.graph, self.model
        if policy is None:
            raise HubMPQError("there is no policy yet")
        if not isinstance(policy, Policy):
            policy = self._uniform(policy)
        table = {layer.name: {policy.bits[layer.name]: 0.0} for layer in graph.searched}
        counted = None if self._beside_target is None else self._for_target(Budget(size=sys.maxsize), graph)
        return usage_of(graph, policy, counted, self._base_bytes(graph, table, model))

    def report(self) -> str:
        """Widths and costs per layer and in all, accuracy before and after, seconds of each stage, and policies that
        were measured."""
        usage = self.usage() if self.policy is not None else None
        graph = self._policy_graph or self.graph
        expected = expected_divergence(self.scores, graph, self.policy, weight_only=self.weight_only)
        unit = self.scores.unit if self.scores is not None else ""
        text = report(graph, self.policy, usage, self.metrics, self.seconds, expected, unit)
        text += "".join(f"\n{note}" for note in fold_notes(self.model))
        if self.result is not None and (measured := measurements(self.result)):
            text += f"\n{measured}"
        if (latency := self.history.get("latency")) is not None:
            text += f"\n{latency_line(latency)}"
        if self.target is not None:
            alone = ": weights alone are quantized" if self.target.weight_only else ""
            notes = [f"made for {self.target.name}{alone}", *self.target.notes(graph)]
            text += "".join(f"\n{note}" for note in notes)
        if self.policy is not None and exportable(self._manifest(self.policy)):
            text += (
                "\nall quantized layers are Linear or Embedding layers: "
                f'push_to_hub(…, format="{COMPRESSED_TENSORS}") '
                "publishes it so that transformers needs no hub-mpq"
            )
        return text

    def base_bytes(self) -> int:
        """Bytes of the packed file beside the searched layers, the same at every policy."""
        return self._base_bytes(self.graph)

    def _base_bytes(self, graph: LayerGraph, table: Scores | None = None, model: nn.Module | None = None) -> int:
        """`base_bytes` at policies of a table's choices: the header tells inputs, groups and zero points."""
        self._check_whole()
        model = model or (self._float[0] if self._float else self.model)
        policy = longest_header(Policy.uniform(graph, "W2A32" if self.weight_only else "W2A2"), table or {})
        return base_nbytes(model, self._manifest(policy, graph))

    # saving and publishing

    def save_pretrained(self, folder: str | Path) -> int:
        """Write config.json, packed weights and scores atomically into a folder; returns the packed bytes.

        Of a model that was loaded from a folder its tokenizer or image processor too.
        """
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy before saving")
        self._check_whole()
        source = self.source
        extra = local_preprocess(self.home, source.library, self.graph.input_shape)
        return save_folder(folder, self.model, self._manifest(self.policy), source.config, self.scores, extra)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        float_copy: bool | None = None,
        format: str = "mpq",
        token: str | bool | None = None,
        **card: str | None,
    ) -> CommitInfo:
        """Publish the quantized model as "owner/name" in one commit.

        Args:
            repo_id: "owner/name".
            private, revision, create_pr, token: As in `hub_mpq.hub.publish.publish`.
            float_copy: Dequantized weights too, that plain timm or transformers load (None: for their models, yes).
            format: "mpq"; "compressed-tensors" publishes policies of transformers models over Linear and Embedding
                layers so that nobody needs this package.
            card: license, base_model, pipeline_tag, dataset, eval_task, trained_on, message.
        """
        check_repo_id(repo_id)
        # the packed file does not tell where on this disk its base model lies
        known = {key: value for key, value in local_card(self.home).items() if card.get(key) is None}
        with tempfile.TemporaryDirectory(prefix="hub-mpq-") as folder:
            self.save_pretrained(folder)
            return publish(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                float_copy=float_copy,
                format=format,
                token=token,
                model=self.model,
                seconds=self.seconds,
                **{**card, **known},
            )

    def export(self, folder: str | Path, format: str) -> int:
        """Write the quantized model for other programs: format "compressed-tensors", "gguf" or "onnx"; returns the
        bytes.

        Formats, and what each refuses, are described in hub_mpq.export.
        """
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy before exporting")
        self._check_whole()
        source = self.source
        example = placed(source.example, self.model)
        return export(folder, format, self.model, self._manifest(self.policy), source.config, example)

    def _check_whole(self) -> None:
        """Raise HubMPQError for a model that a runtime has in a form of its own."""
        if (layers := getattr(self.model, "runtime_layers", None)) is not None:
            raise HubMPQError(f"it was loaded with runtime={layers.runtime!r} and only runs; load it without runtime=")

    def _tell_transformers(self) -> None:
        """So that `mpq.model.save_pretrained` writes the packed format and transformers' Trainer trains `mpq.model`."""
        if self.policy is not None and libraries.get(self.source.library).pretrained_models:
            from .hub.plugin import prepare

            prepare(self.model, self._manifest(self.policy))

    def _manifest(self, policy: Policy, graph: LayerGraph | None = None) -> Manifest:
        # a loss that is NaN has no place in JSON
        metrics = {
            of: {k: v for k, v in found.items() if isinstance(v, str) or math.isfinite(v)}
            for of, found in self.metrics.items()
        }
        provenance: dict[str, Any] = {"hub_mpq": __version__, "metrics": metrics, **self.history}
        if self.target is not None:
            provenance["target"] = self.target.name
        if self.task is not None:
            named = tasks.get(self.task) if isinstance(self.task, str) else self.task
            provenance["task"] = named.settings()
        if self.result is not None:
            found = self.result
            proof = {"status": found.status, "objective": found.objective, "gap": found.gap}
            provenance["search"] = {
                "strategy": found.strategy,
                **(proof if found.policy == found.optimum else {}),
                **({"chosen_by": found.chosen_by} if found.measurements else {}),
                "seed": found.seed,
                **{key: _brief(value) for key, value in found.details.items()},
            }
        source = self.source
        # a local folder's path is nobody's business: its name says as much
        base = Path(source.model_id).name if Path(source.model_id).is_dir() else source.model_id
        graph = replace(graph or self._policy_graph or self.graph, model_id=base)
        return Manifest(base, source.revision, source.library, graph, policy, provenance)

    # what a call may change for itself

    @property
    def _example(self) -> Any:
        """The example input on the device of the model, which may have been moved."""
        return placed(self.source.example, self._float[0] if self._float else self.model)

    def _told(self, task: TaskLike) -> dict[str, Any]:
        """What the functions below need to know of the task."""
        return {"task": self.task if task is None else task, "example": self._example}

    def _pinned(self, fixed: Pins | None) -> LayerGraph:
        """The graph with layers pinned or freed for one call, at widths that the target has."""
        graph, target = self.graph.with_fixed(fixed) if fixed else self.graph, self.target
        if target is None and not self.weight_only:
            return graph
        pinned = {x.name: x.fixed for x in graph if x.fixed is not None}
        if self.weight_only:
            pinned = {name: bits.of_weight for name, bits in pinned.items()}
        if target is not None:
            if not target.weight_only:  # a pin of the user is refused, a default is fitted
                for name in {name for pattern in fixed or () for name in graph.match(pattern)} & set(pinned):
                    target.check_layer(graph[name], pinned[name])
            pinned = target.levels(graph, pinned)
        return graph.with_fixed({glob.escape(name): bits for name, bits in pinned.items()})

    def _uniform(self, level: LayerBits | str, group_size: int | None = None, symmetric: bool = True) -> Policy:
        """A level in all searched layers; with a target what its menu has for it."""
        policy = Policy.uniform(self.graph, level).with_groups(self.graph, group_size, symmetric)
        if self.target is None:
            return policy
        bits = self.target.levels(self.graph, {x.name: policy.bits[x.name] for x in self.graph.searched})
        return Policy({x.name: x.fixed or bits[x.name] for x in self.graph}, self.graph.digest)

    def _budget_here(self, budget: Budget, graph: LayerGraph) -> Budget:
        """A budget in terms of the target; InvalidArgument where its latency table is of something else."""
        if budget.latency_table is not None:
            check_table(budget.latency_table, graph, None if self.target is None else self.target.name)
        return self._for_target(budget, graph)

    def _for_target(self, budget: Budget, graph: LayerGraph) -> Budget:
        """A budget whose `size` speaks of the target's file, as a cost of the target's name."""
        size, target = budget.limits.get("size"), self.target
        if size is None or target is None or not target.own_size:
            return budget
        if (beside := self._beside_target) is None:
            raise InvalidArgument(f"the bytes of a {target.own_size} are not known for this model: limit weight_bits")
        table = {x.name: {str(bits): float(target.nbytes(x, bits)) for bits in target.menu(x)} for x in graph}
        if isinstance(size, LayerBits):
            level = {x.name: x.fixed or target.level(x, size) for x in graph}
            size = beside + sum(table[name][str(bits)] for name, bits in level.items())
        given = {name: value for name, value in budget.given.items() if name != "size"}
        costs = {**budget.costs, target.own_size: (size, table, beside)}
        return Budget(**given, **{**budget.tables, "costs": costs})

    @cached_property
    def _beside_target(self) -> int | None:
        """Bytes of the target's file beside the layers, where they are known."""
        if self.target is None or not self.target.own_size:
            return None
        return self.target.beside_nbytes(self._float[0] if self._float else self.model, self.graph)

    def _candidates(
        self, graph: LayerGraph, value: CandidatesLike, group_size: GroupSizes = None, symmetric: bool = True
    ) -> dict[str, Candidates]:
        """Candidates of every searched layer, of weights alone where only weights are searched."""
        found = resolve_candidates(graph, value, group_size, symmetric)
        if self.target is not None:
            own = value is None
            return {name: self.target.candidates(graph[name], c, all_widths=own) for name, c in found.items()}
        if not self.weight_only:
            return found
        return {name: replace(c, activation=(FLOAT_BITS,)) for name, c in found.items()}


def _check_numbers(*, alpha: Any = None, time_limit: Any = None, validate_seconds: Any = None) -> None:
    """Raise InvalidArgument for a number that means nothing, before any work."""
    if alpha is not None:
        number("alpha", alpha)
    seconds("time_limit", time_limit)
    seconds("validate_seconds", validate_seconds)


def _brief(facts: Any) -> Any:
    """What a strategy says of itself without its tables of layers, which would outgrow the header's reserve, and
    without seconds: two runs of one seed give the same file."""
    if not isinstance(facts, Mapping):
        return facts
    return {k: v for k, v in facts.items() if not isinstance(v, (Mapping, list)) and not k.endswith("seconds")}


def _states_of(folder: str | Path, strategy: str, strategy_options: OptionsLike | None, budget: Budget | None) -> Path:
    """Folder for the states of a search: by search, since the state of another one would load without a word, or fail
    in torch's."""
    cls = strategy_named(strategy)
    if cls.learned_once:
        return Path(folder) / (cls.stage or cls.name)
    limits = None if budget is None else [dict(budget.given), dict(budget.costs)]
    return Path(folder) / f"search-{_mark([strategy, strategy_options, limits])}"


def _mark(tree: Any) -> str:
    """Twelve characters that stand for JSON values; an object counts by its type."""
    text = json.dumps(tree, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
