"""HubMPQ: a timm or Hugging Face model together with its mixed-precision policy."""

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
from .hub.origin import OWN_WEIGHTS, local_card
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
from .report import allowances, latency_line, measurements, report, warn_of_not_run
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
    """A timm or Hugging Face model (or any network) and, after a search, its mixed-precision policy.

    Use `HubMPQ.from_pretrained` or `HubMPQ.from_module` to create one; the constructor takes a model that an adapter
    has already loaded.

    Args:
        source: The loaded model with its layer graph, see `hub_mpq.adapters.Source`.
        task: What the model is for: a task's name such as "regression", or a `Task`. None detects it from the model and
            the batches.
        fixed: `{name or pattern: "W8A8" or None}`: pinned layers, which keep these bit-widths (None: layers that are
            searched).
        weight_only: Quantize weights only; all inputs stay float, those of fixed layers too.
        tie_fused: Layers of one module that read the same input (q, k, v; gate, up) share one weight bit-width.
        target: The `Target` that policies are made for, or its name; None for hub-mpq's own file.

    Attributes:
        model: The network that runs: float until a policy is applied, then quantized.
        graph: Its layers, a `LayerGraph`.
        scores: The layers' scores from a search strategy; None until one has run.
        policy: The policy that is applied; None until there is one.
        result: The search that found the policy, with its proof; None for a policy that you passed in.
        metrics: Measured figures, `{"float" or "quantized": {metric: value}}`.
        history: How the quantized model was made, `{"search" or "finetune" or "latency" or "runtimes": facts}`.
        seconds: Wall time of each stage, `{stage: seconds}`.

    Raises:
        InvalidArgument: The task or target is unknown, a pinned bit-width is not one that the target supports, or
            `weight_only` is combined with a target that computes in integers.

    Example:
        >>> from hub_mpq import HubMPQ
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> mpq.graph.names[:2]
        ('conv1.0', 'conv1.3')
        >>> print(mpq.report())  # doctest: +ELLIPSIS
        test_resnet (timm), input 3×32×32
        ...
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
        task_of(task, source.model)  # so that an unknown name is refused by this call
        self.task = task
        if weight_only and self.target is not None and not self.target.weight_only:
            raise InvalidArgument(
                f"target {self.target.name!r} computes in integers and cannot be combined with weight_only=True"
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
        self._own_weights = False  # whether the float weights are other than the published ones
        self._policy_graph: LayerGraph | None = None  # the graph with the pins of the policy that is applied
        # in a tuple: the float model is no submodule, or every state dict would hold it too
        self._float: tuple[nn.Module, ...] = (source.model,)

    @classmethod
    @torch.inference_mode(False)  # so that a model loaded in inference mode can be trained like any other
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
        """Load a float or packed model by its name, Hub id or folder.

        Of a published packed model only the config, the packed weights, the indicators and the preprocessing files are
        downloaded. If it is pinned to a commit that is in the cache, no request is made.

        Args:
            model_id: A timm name, a Hugging Face id, "hf-hub:…", a local folder, or what `save_pretrained` or
                `push_to_hub` wrote.
            module: The network itself, for a packed model that no library can build. A copy of it receives the weights,
                in the dtypes that the model was saved in.
            task: What the model is for: a task's name such as "regression", or a `Task`. None detects it from the model
                and the batches.
            fixed: `{name or pattern: "W8A8" or None}`: pinned layers, which keep these bit-widths (None: layers that
                are searched). By default the stem and the head are pinned at 8 bits, and the weights of embeddings at 8
                bits.
            exclude: Patterns of layers to leave float.
            weight_only: Quantize weights only; all inputs stay float, those of fixed layers too.
            tie_fused: Layers of one module that read the same input (q, k, v; gate, up) share one weight bit-width, as
                runtimes that fuse them (vLLM) require.
            target: What policies are made for. "onednn", "openvino", "onnxruntime" or "bit_serial": a runtime, at the
                bit-widths that it computes exactly in integers on every x86 CPU, so that W7A8 replaces W8A8. "vllm"
                (compressed-tensors) or "gguf" (llama.cpp): weights only. Or a `Target`. Candidates are limited to the
                target's menu, its ties apply, and `size` counts the bytes of its file where that differs from the
                packed file. None: hub-mpq's own file.
            per_expert: Give each expert of a mixture-of-experts model its own bit-widths and scores. False: one
                decision per stack of experts. A packed model keeps what it was made with.
            pretrained: Download the published weights.
            resident: For packed transformers models: "packed" or "float", how inference-only layers keep their weights
                in memory, see `hub_mpq.set_resident`. None: float weights behind quantizers, which can be trained.
            runtime: For packed models: the runtime that executes it, see `to_runtime`; "auto" picks the best one here.
                The model is then inference-only. None: float weights behind quantizers, which can be trained, saved and
                published.
            revision: Branch, tag or commit.
            token: Hub token, as in huggingface_hub.
            local_files_only: Use cached files only; make no request.
            **kwargs: Passed on to timm or transformers, for example `num_classes` or `checkpoint_path`.

        Returns:
            The `HubMPQ`. A packed model comes with its policy, its metrics and its stored scores.

        Raises:
            InvalidArgument: An argument that says what to quantize was passed for a packed model, or `resident` or
                `runtime` for a model that does not support it.
            HubMPQError: The model cannot be loaded, or the runtime cannot be used here.

        Example:
            >>> from hub_mpq import HubMPQ
            >>> pins = {"fc": "W4A8"}
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, fixed=pins, exclude=["layer1.*"])
            >>> str(mpq.graph["fc"].fixed)
            'W4A8'
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
                out.source = replace(out.source, model=out.model)  # so that the memory of the original is freed
            return out
        for name, value in {"resident": resident, "runtime": runtime}.items():
            if value is not None:
                raise InvalidArgument(
                    f"{name}= is only for packed models, and no packed model was found as {str(model_id)!r}; "
                    "for a model on the Hub, check the name and the network"
                )
        kwargs |= {key: value for key, value in {**where, "per_expert": per_expert}.items() if value}
        source = adapters.load(str(model_id), pretrained=pretrained, exclude=exclude, **kwargs)
        warn_of_not_run(source.graph)
        out = cls(source, task=task, fixed=fixed, weight_only=weight_only, tie_fused=tie_fused, target=target)
        out._own_weights = not pretrained or kwargs.get("checkpoint_path") is not None
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
        """Wrap any network; the network itself is not modified.

        Args:
            net: The network.
            example_input: One batch as its forward takes it: a tensor, a tuple of positional arguments or a dict of
                keyword arguments.
            model_id: A name for it; None for the name of its class.
            task: What the model is for: a task's name such as "regression", or a `Task`. None detects it from the model
                and the batches.
            fixed: `{name or pattern: "W8A8" or None}`: pinned layers, which keep these bit-widths (None: layers that
                are searched).
            exclude: Patterns of layers to leave float.
            weight_only: Quantize weights only; all inputs stay float.
            tie_fused: Layers of one module that read the same input share one weight bit-width.
            target: What policies are made for, see `from_pretrained`.
            per_expert: Give each expert of a mixture-of-experts model its own bit-widths and scores.

        Returns:
            The `HubMPQ`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from hub_mpq import HubMPQ
            >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
            >>> mpq = HubMPQ.from_module(net, torch.zeros(1, 8), model_id="mlp")
            >>> {layer.name: str(layer.fixed) for layer in mpq.graph}
            {'0': 'W8A8', '2': 'None', '4': 'W8A8'}
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
        out._own_weights = manifest.provenance.get("weights") == OWN_WEIGHTS
        out.scores = read_folder_indicators(folder)
        out.metrics = {k: dict(v) for k, v in manifest.provenance.get("metrics", {}).items()}
        out.history = {
            k: dict(v) for k, v in manifest.provenance.items() if k in ("search", "finetune", "latency", "runtimes")
        }
        if resident is None:  # transformers itself loaded the other
            out._tell_transformers()
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model's own forward.

        Args:
            *args: Positional arguments of the model's forward.
            **kwargs: Its keyword arguments.

        Returns:
            What the model returns.
        """
        return self.model(*args, **kwargs)

    @property
    def float_model(self) -> nn.Module:
        """The model before quantization.

        Raises:
            HubMPQError: The model was loaded from packed weights, which have no float original.
        """
        if not self._float:
            raise HubMPQError(
                "this model was loaded from packed weights and has no float weights to start from; "
                f"load its base model {self.graph.model_id!r} to quantize it again"
            )
        return self._float[0]

    @property
    def indicators(self) -> Indicators | None:
        """`scores`, under the name that published cards use."""
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
        """Learn the importance of every layer at every candidate bit-width with LIMPQ.

        One training serves every later budget.

        Args:
            train: Batches `(inputs, labels)`, dicts with labels, or inputs alone, which are trained on by distillation.
                Several inputs are `((first, second), labels)`. Tensors or arrays; labels may also be lists.
            options: An `IndicatorOptions` or a dict of its fields: length, learning rates and so on. None for the
                defaults.
            candidates: Bit-widths that layers may take: `[2, 3, 4]`, a `Candidates`, or a dict of these by kind of
                layer, name or pattern. None: 2 to 6 bits.
            fixed: `{name or pattern: "W8A8" or None}`, for this call only.
            task: What the model is for; None for `self.task`, or to detect it.
            engine: An `Engine` or a dict of its fields: precision, memory, trackers.
            **changes: Single options by name; they override those of `options`.

        Returns:
            The scores, which are kept in `scores` as well.

        Raises:
            InvalidArgument: An option is unknown or out of range, or a batch does not fit the model.
            HubMPQError: The model was loaded from packed weights.

        References:
            LIMPQ (Tang et al., ECCV 2022), §3.3.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> scores = mpq.train_indicators([(images, torch.arange(4))], candidates=[2, 4], steps=1)
            >>> sorted(scores.weight["layer1.0.conv1"])
            [2, 4]
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
        """Score the layers with a search strategy.

        Later searches use the scores, and `save_pretrained` stores them with the model.

        Args:
            train: Batches `(inputs, labels)`, dicts with labels, or inputs alone, which are trained on by distillation.
                Several inputs are `((first, second), labels)`. Tensors or arrays; labels may also be lists.
            options: An `IndicatorOptions` or a dict of its fields: length, learning rates and so on. None for the
                defaults.
            strategy: "limpq", "dq", "ebs", "seam", "bsq", "gradient", "hessian", "mse", "kl", one that was registered,
                or "file.py:name".
            strategy_options: Arguments of the strategy's constructor.
            candidates: Bit-widths that layers may take: `[2, 3, 4]`, a `Candidates`, or a dict of these by kind of
                layer, name or pattern. None: 2 to 6 bits.
            fixed: `{name or pattern: "W8A8" or None}`, for this call only.
            budget: The target of strategies that train with a penalty: a `Budget` or a dict of limits.
            task: What the model is for; None for `self.task`, or to detect it.
            engine: An `Engine` or a dict of its fields: precision, memory, trackers.
            **changes: Single options by name; they override those of `options`.

        Returns:
            The scores, which are kept in `scores` as well.

        Raises:
            InvalidArgument: The strategy or an option is unknown or out of range, or a batch does not fit the model.
            HubMPQError: The model was loaded from packed weights.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> mpq.train_scores([images], strategy="mse", candidates=[2, 4]).strategy
            'mse'
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
        """Return the table of scores that the solver adds up.

        Args:
            alpha: Multiplier for LIMPQ's weight indicators. None: 1 for scores in one unit, else the value that
                balances the sums over weights and activations.
            candidates: Bit-widths to include; None for all that have a score.

        Returns:
            `({searched layer: {LayerBits: score}}, alpha)`. `scores.sense` says whether lower ("min") or higher ("max")
            is better.

        Raises:
            HubMPQError: There are no scores yet.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> scores = mpq.train_scores([images], strategy="mse", candidates=[2, 4])
            >>> table, alpha = mpq.score_table()
            >>> [str(bits) for bits in table["layer1.0.conv1"]]
            ['W2A2', 'W2A4', 'W4A2', 'W4A4']
        """
        _check_numbers(alpha=alpha)
        chosen = self._scored_candidates(self.graph, candidates)
        return score_table(self._scores(), self.graph, chosen, alpha, weight_only=self.weight_only)

    def _scored_candidates(self, graph: LayerGraph, value: CandidatesLike) -> Mapping[str, Candidates] | None:
        """Candidates of a search from the existing scores; None for all that have a score."""
        graph.check_layers()
        scores, searched = self._scores(), {layer.name for layer in graph.searched}
        pairs = {name: row for name, row in scores.pairs.items() if name in searched}
        if value is None:
            if self.target is None:
                return None
            value = candidates_of(pairs) if pairs else scored_candidates(scores, graph, weight_only=self.weight_only)
        return self._candidates(graph, in_scored_groups(resolve_candidates(graph, value), pairs))

    def _scores(self) -> Indicators:
        """The scores; HubMPQError if there are none yet."""
        if self.scores is None:
            raise HubMPQError("there are no indicators yet; call train_indicators or quantize first")
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
        """Find the best policy within a budget; the model does not change.

        The result is the policy with the best sum of scores, with a proof of optimality. With `validate` policies are
        also measured, and the one that measures best is returned.

        Args:
            budget: A `Budget` or a dict of limits; or pass limits by name. In a level ("W4"), weights are in groups of
                the first of the candidates' group sizes.
            alpha: Multiplier for LIMPQ's weight indicators. None: 1 for scores in one unit, else the sums are balanced.
            candidates: Bit-widths that layers may take; None for all that have a score. If all scores are of weights in
                groups or with zero points, a bit-width stands for those.
            fixed: `{name or pattern: "W8A8" or None}`, for this call only.
            time_limit: Seconds; after that the best policy so far is returned, with its gap.
            validate: Batches to measure policies on; labels are ignored. The optimum, uniform (the most expensive level
                within the budget) and a few others are measured on up to 2,048 samples or 4,096 tokens. The optimum is
                returned unless another policy is measurably better, see `hub_mpq.search.validate`.
            validate_seconds: Time limit for these measurements. None: a quarter of the time that the scores took, at
                least 30.
            **limits: Limits by name (`bitops=`, `size=`, `compression=`, …, see `Budget`).

        Returns:
            The `SearchResult`: policy, cost, proof and, with `validate`, measurements.

        Raises:
            InfeasibleBudget: No policy meets the budget; the error reports the minimum of each limit.
            InvalidArgument: No limit is given, or an argument is out of range.
            HubMPQError: There are no scores yet.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> scores = mpq.train_scores([images], strategy="mse", candidates=[2, 4, 6])
            >>> result = mpq.search(bitops="W4A4")
            >>> result.status, result.usage["bitops"] <= mpq.usage("W4A4")["bitops"]
            ('optimal', True)
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
        """What a search needs besides the budget."""
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
            warnings.warn(f"the scores are a poor prediction of measured policies: {poor[0]}", stacklevel=3)

    def check_reachable(
        self,
        budget: Budget | OptionsLike | None = None,
        *,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        strategy: str | None = None,
        **limits: Any,
    ) -> None:
        """Raise `InfeasibleBudget` if no policy meets a budget; needs no scores.

        Args:
            budget: A `Budget` or a dict of limits; or pass limits by name.
            candidates: Bit-widths that layers may take.
            fixed: `{name or pattern: "W8A8" or None}`, for this call only.
            strategy: The strategy that will search. None: check against the existing scores, if any.
            **limits: Limits by name, as in `search`.

        Raises:
            InfeasibleBudget: No policy of the candidates meets the budget; the error reports the minimum of each limit.
            InvalidArgument: No limit is given, or one cannot be parsed.

        Example:
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> mpq.check_reachable(bitops="W4A4")
            >>> mpq.check_reachable(size="1KB")  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            hub_mpq.errors.InfeasibleBudget: no policy meets the budget: ...
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
        """Find the best policies along one limit.

        Args:
            limit: The limit to vary, such as "bitops" or "size".
            points: Number of budgets between the minimum and the maximum, from 2 to 10,000.
            budget: Other limits that apply at every point: a `Budget` or a dict; or pass limits by name.
            alpha: Multiplier for LIMPQ's weight indicators. None: 1 for scores in one unit, else the sums are balanced.
            candidates: Bit-widths that layers may take; None for all that have a score. If all scores are of weights in
                groups or with zero points, a bit-width stands for those.
            fixed: `{name or pattern: "W8A8" or None}`, for this call only.
            time_limit: Seconds for all points together; after that the best policies so far are returned, with their
                gaps.
            validate: Batches to measure policies on, as in `search`: each point is then the policy that measures best.
            validate_seconds: Time limit for the measurements of each point. None: as in `search`.
            **limits: Other limits by name, as in `search`.

        Returns:
            One `SearchResult` per point, in order of the limit.

        Raises:
            InfeasibleBudget: No policy meets the other limits.
            InvalidArgument: The limit is unknown or cannot be varied, or an argument is out of range.
            HubMPQError: There are no scores yet.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> scores = mpq.train_scores([images], strategy="mse", candidates=[2, 4])
            >>> sizes = [result.usage["size"] for result in mpq.pareto("size", points=3)]
            >>> sizes == sorted(sizes)
            True
        """
        whole("points", points, 2, 10_000)
        _check_numbers(alpha=alpha, time_limit=time_limit, validate_seconds=validate_seconds)
        graph = self._pinned(fixed)
        scored = self._scored(graph, alpha, self._scored_candidates(graph, candidates))
        others = Budget.of(budget, limits)
        if others is not None:
            others = self._budget_here(others, graph).with_groups(*first_groups(scored.candidates))
        if limit == "size" and self.target is not None and self.target.own_size:
            raise InvalidArgument(f"cannot vary the size of a {self.target.own_size}; use limit='weight_bits' instead")
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
        """Quantize a copy of the float model at a policy, without training.

        Args:
            policy: A `Policy`, the result of `search`, or a level ("W4A4", "W4g128A8") for all searched layers.
            calibration: Batches to calibrate the scales of inputs on; None for synthetic inputs.
            batches: Number of batches that the scales of inputs are calibrated on.
            per_channel: One weight scale per output channel; False: one per tensor.
            group_size: Number of weights of a row that share a scale, at least 8, typically 32, 64 or 128, in searched
                layers whose policy names none. None: no groups. Only linear layers, embeddings and experts have
                groups.
            symmetric: False adds zero points to the scales of these layers.
            rounding: "gptq" or "nearest", see `hub_mpq.train.round_weights`; uses up to 16 batches. None: "gptq" for a
                weight-only policy with calibration data, else "nearest".
            reestimate_norms: Also re-estimate BatchNorm statistics, on up to 16 batches of `calibration`.
            task: What the model is for, which decides what of a batch is an input; None for `self.task`, or to detect
                it.

        Returns:
            `self`, with `model` quantized.

        Raises:
            PolicyMismatch: The policy is for another model.
            InvalidArgument: A level, group size or rounding is not valid for these layers.
            HubMPQError: The model was loaded from packed weights.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> mpq.apply_policy("W4A4", [images])(images).shape
            torch.Size([4, 1000])
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
        cyclic = hasattr(self.model, "hf_quantizer")  # it holds the model itself
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
            train: Batches, as in `train_scores`.
            options: A `FinetuneOptions` or a dict of its fields: length, learning rates and so on. None for the
                defaults.
            task: What the model is for; None for `self.task`, or to detect it.
            engine: An `Engine` or a dict of its fields: precision, memory, compiler, trackers.
            **changes: Single options by name; they override those of `options`.

        Returns:
            The `TrainLog`: steps, samples, seconds and the loss of each epoch.

        Raises:
            InvalidArgument: An option is unknown or out of range.
            HubMPQError: No policy is applied yet, or the model was loaded with `resident` or `runtime` and cannot be
                trained.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> log = mpq.apply_policy("W4A4", [images]).finetune([(images, torch.arange(4))], steps=1, lr=1e-4)
            >>> log.steps, log.samples
            (1, 4)
        """
        chosen = FinetuneOptions.of(options, **changes)
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy first")
        if any(packed_layers(self.model)):
            raise HubMPQError("packed layers cannot be trained; load the folder without resident=")
        self._check_whole()
        teacher = self._float[0] if self._float else None
        self.metrics.pop("quantized", None)  # they were measured before this training
        log = finetune(self.model, train, chosen, teacher=teacher, engine=engine, **self._told(task))
        self.seconds["finetune"] = log.seconds
        self.history.pop("runtimes", None)  # these too
        self.history["finetune"] = {**chosen.changed(), "steps": log.steps, "samples": log.samples}
        return log

    def evaluate(self, loader: Iterable[Any], *, task: TaskLike = None) -> dict[str, Any]:
        """Measure the task's metrics, or fidelity to the float model if the batches have no labels.

        The figures are also kept in `metrics`.

        Args:
            loader: Batches, as in `train_scores`.
            task: What the model is for; None for `self.task`, or to detect it.

        Returns:
            `{metric: value}`, with the task's name as "task" and the number of "samples".

        Raises:
            InvalidArgument: A batch does not fit the model or the task.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> sorted(mpq.evaluate([(images, torch.arange(4))]))
            ['loss', 'samples', 'task', 'top1', 'top5']
        """
        reference = self._float[0] if self._float else None
        figures = evaluate(self.model, loader, reference=reference, **self._told(task))
        self.metrics["quantized" if self.policy is not None else "float"] = figures
        return figures

    def perplexity(
        self, text: str | Path | Any, *, context: int | None = None, stride: int | None = None, task: TaskLike = None
    ) -> dict[str, Any]:
        """Measure the perplexity per token of a causal language model, see `hub_mpq.train.perplexity`.

        Args:
            text: A text file or a dataset ("hfds/NAME[:CONFIG][:SPLIT]", see `hub_mpq.data.text.read_text`), which the
                model's own tokenizer encodes; or token ids.
            context: Tokens per window. None: 1,024, or the model's maximum if that is less.
            stride: Tokens from one window to the next. None: `context`, so that windows do not overlap.
            task: What the model is for; None for `self.task`, or to detect it.

        Returns:
            `{metric: value}` with "perplexity", the number of "tokens", "context" and "stride".

        Raises:
            InvalidArgument: The model is not a causal language model, or a length is out of range.

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from hub_mpq import HubMPQ
            >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
            >>> net = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
            >>> mpq = HubMPQ.from_module(net, {"input_ids": torch.zeros(1, 8, dtype=torch.long)})
            >>> figures = mpq.perplexity(torch.arange(64), context=16)
            >>> figures["tokens"], figures["context"]
            (60, 16)
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
        """Build a module with the same forward that computes the quantized model on a runtime.

        Args:
            name: "torch" (the reference), "onednn", "openvino", "onnxruntime", "bit_serial", or a registered runtime.
                "auto": "onednn" where it can be used, else "torch".
            example: One batch whose tensor sizes are those that speed matters at. None: the model's example input, one
                sample.
            allow_inexact: Also return a module whose outputs exceed the error bounds of the certificate.

        Returns:
            The module, in evaluation mode. Its `runtime_layers` says which layers compute in integers, and why others
            do not.

        Raises:
            InvalidArgument: The runtime is unknown, or no policy is applied yet.
            HubMPQError: The runtime cannot be used here, or its result is not the same model.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> fast = mpq.apply_policy("W4A4", [images]).to_runtime("torch")
            >>> fast(images).shape
            torch.Size([4, 1000])
            >>> fast.runtime_layers.runtime
            'torch'
        """
        self._check_whole()
        example = self._example if example is None else example
        if not isinstance(example, Tensor) and not example:  # of a network that was passed to from_pretrained
            example = likely_example(self.model, self.graph.input_shape)
        return to_runtime(self.model, name, example, allow_inexact=allow_inexact)

    def certify(self, module: nn.Module, batches: Iterable[Any], *, task: TaskLike = None) -> Certificate:
        """Measure whether a module from `to_runtime` computes the same model as this one.

        The result is recorded, and the card that `push_to_hub` writes shows it.

        Args:
            module: A module that `to_runtime` made from this model.
            batches: Batches, as in `evaluate`, with or without labels. Layers are compared on the first one.
            task: What the model is for; None for `self.task`, or to detect it.

        Returns:
            The `Certificate`: per layer the largest error, rounding flips and saturations, and the task's metrics on
            both.

        Raises:
            HubMPQError: This model was loaded with `runtime`, so there is no reference to compare with.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> fast = mpq.apply_policy("W4A4", [images]).to_runtime("torch")
            >>> mpq.certify(fast, [images]).exact
            True
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
        """Score the layers, search a policy, quantize and fine-tune, in one call.

        Args:
            budget: A `Budget` or a dict of limits; or pass limits by name. Strategies that infer bit-widths (DQ, BSQ)
                need none.
            train: Batches to train on, as in `train_scores`. None: stored indicators or a data-free calibration are
                used, with a warning.
            val: Labelled batches to measure accuracy on, before and after.
            epochs: Length of fine-tuning in epochs; 0 only calibrates.
            steps: Length of fine-tuning in optimizer steps; overrides `epochs`.
            strategy: What scores the layers, see `train_scores`. None: the strategy of `indicators`, else "limpq", or
                "gradient" if weights are rounded by GPTQ.
            strategy_options: Arguments of the strategy's constructor.
            indicators: Scores that were learned before, such as `scores` of a published model.
            indicator_options: An `IndicatorOptions` or a dict of its fields.
            alpha: Multiplier for LIMPQ's weight indicators, see `search`.
            candidates: Bit-widths that layers may take; None: 2 to 6 bits, or those that were scored.
            fixed: `{name or pattern: "W8A8" or None}`, for this policy only.
            task: What the model is for; None for `self.task`, or to detect it.
            per_channel: One weight scale per output channel; False: one per tensor.
            group_size: Number of weights of a row that share a scale, at least 8, typically 32, 64 or 128; or several,
                such as `[None, 128, 32]`, for the solver to choose from (weights are then rounded before they are
                scored). Levels in the budget ("W4") use the first of them. None: one scale per output channel.
            symmetric: False adds zero points to the scales.
            rounding: "gptq" or "nearest": round weights on `train` before they are scored, see
                `hub_mpq.train.round_weights`. None: "gptq" for weight-only quantization with `train` and without
                fine-tuning.
            seed: Seed of all stages whose options do not set their own.
            checkpoint_dir: Folder for checkpoints and intermediate results; None writes none.
            resume: Resume an interrupted call from `checkpoint_dir`.
            finetune_options: A `FinetuneOptions` or a dict of its fields.
            engine: An `Engine` or a dict of its fields, for all trainings: precision, memory, trackers.
            validate: Measure policies before one is chosen, as in `search`, with weight scales and norms estimated on
                `train`. True: on `val` without its labels, or, without `val`, on training batches that no score was
                read from, if there are any. Batches: on these. False: take the optimum of the scores.
            validate_seconds: Time limit for these measurements. None: a quarter of the time that the scores took, at
                least 30.
            **limits: Limits by name (`bitops=`, `size=`, `compression=`, …, see `Budget`).

        Returns:
            `self`, with `model` quantized and `policy`, `result` and `metrics` set.

        Raises:
            InfeasibleBudget: No policy meets the budget; the error reports the minimum of each limit.
            InvalidArgument: An argument is unknown, out of range, or in conflict with another.
            HubMPQError: The model was loaded from packed weights.

        References:
            LIMPQ (Tang et al., ECCV 2022), §3.3 (indicators) and §3.4 (search).

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> train = [(images, torch.arange(4))]
            >>> short = {"steps": 1}
            >>> mpq = mpq.quantize(bitops="W4A4", train=train, steps=1, candidates=[2, 4, 6], indicator_options=short)
            >>> mpq.usage()["bitops"] <= mpq.usage("W4A4")["bitops"]
            True
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
            raise InvalidArgument("fsdp is only supported for training indicators, not for fine-tuning; pass epochs=0")
        if indicators is not None and strategy and strategy_named(strategy).name != indicators.strategy:
            raise InvalidArgument(
                f"strategy={strategy!r} does not match the indicators, made by {indicators.strategy!r}"
            )
        graph = self._pinned(fixed)
        if candidates is None:
            held = None if self.weight_only else self.scores
            candidates = self._learned_widths(graph, held if indicators is None else indicators, strategy)
        candidates = self._candidates(graph, candidates, group_size, symmetric)
        if wanted is not None:
            wanted = self._budget_here(wanted, graph)
            if "latency" in wanted.limits:  # fail before a training if it cannot be measured
                runtime_here(wanted.latency_table.runtime)  # type: ignore[union-attr]
            wanted = wanted.with_groups(*first_groups(candidates, group_size))
        alone = weights_alone(graph, candidates)
        if rounding is None and alone and per_channel and train is not None and not tuned and world()[1] == 1:
            rounding = "gptq"
        if rounding is not None and (train is None or world()[1] > 1 or not per_channel):
            raise InvalidArgument(
                f"rounding={rounding!r} requires train=, a single process, and one scale per output channel or group"
            )
        strategy = strategy or (indicators.strategy if indicators is not None else "gradient" if rounding else "limpq")
        if wanted is None and (indicators.inferred is None if indicators is not None else not infers_widths(strategy)):
            Budget()  # fail before a training if a budget is needed
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
        if checkpoint_dir:
            try:  # before the work that it is to keep
                Path(checkpoint_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidArgument(
                    f"cannot create the folder checkpoint_dir={str(checkpoint_dir)!r}: {error}"
                ) from error
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
        # only one process searches and measures: with a time limit they could end at different policies
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
                # a state of other bit-widths, or of weights that were rounded differently, would load silently
                of = [policy.to_dict(), rounding]
                tuning = tuning.filled(checkpoint_dir=Path(checkpoint_dir) / f"finetune-{_mark(of)}")
            self.finetune(train, tuning, task=task, engine=engine)
        if val is not None:
            self.evaluate(val, task=task)
        return self

    def measure_latency(
        self, runtime: str = "onednn", *, batch_size: int = 1, threads: int = 1, candidates: CandidatesLike = None
    ) -> LatencyTable:
        """Time each layer on a runtime, in integers at each supported bit-width and in float, and the whole model.

        `latency=` needs this table: `quantize(latency="5ms", latency_table=table)`. It is valid for this machine,
        runtime, batch size, number of threads and input size only. `hub_mpq.write_latency_table` saves it.

        Args:
            runtime: As in `to_runtime`, except "auto".
            batch_size: Samples per call.
            threads: Threads that a call may use.
            candidates: Bit-widths to time on a runtime whose time depends on them (bit_serial); None: 1 to 8. Other
                runtimes compute all bit-widths with one kernel, which is timed once.

        Returns:
            The `LatencyTable`, times in seconds.

        Raises:
            InvalidArgument: A number is below 1, or the runtime is unknown.
            HubMPQError: The runtime cannot be used here, or the model was loaded from packed weights.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from hub_mpq import HubMPQ
            >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
            >>> table = HubMPQ.from_module(net, torch.zeros(1, 8)).measure_latency("onednn")
            >>> table.runtime, table.batch_size, table.threads
            ('onednn', 1, 1)
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
        """Correct the table by the optimum's time first: measuring policies for their accuracy takes longer."""
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
        """Whether the existing scores are what this strategy would learn once for all budgets."""
        found = self.scores
        if found is None or found.strategy != strategy or not strategy_named(strategy).learned_once:
            return False
        return {layer.name for layer in graph.searched} <= {*found.weight, *found.pairs}

    def _learned_widths(self, graph: LayerGraph, scores: Indicators | None, strategy: str | None) -> CandidatesLike:
        """With a target: the widths that have scores, which may be fewer than its menu; else None."""
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
                "no training data and no stored indicators: searching and calibrating on synthetic inputs; pass train= "
                "for a learned policy",
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
        """Compute what a policy costs, for the whole model.

        Args:
            policy: A `Policy`, or a level for all searched layers; None for the policy that is applied.

        Returns:
            The `Usage`, `{limit: amount}`: BitOps, bytes of the packed file, mean weight bits and so on.

        Raises:
            HubMPQError: No policy is given and none is applied.

        Example:
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> mpq.usage("W4A4")["bitops"]
            77021184
        """
        graph, model = self.graph, None
        if policy is None:
            policy, graph, model = self.policy, self._policy_graph or self.graph, self.model
        if policy is None:
            raise HubMPQError("there is no policy yet; pass one, or call quantize or apply_policy first")
        if not isinstance(policy, Policy):
            policy = self._uniform(policy)
        table = {layer.name: {policy.bits[layer.name]: 0.0} for layer in graph.searched}
        counted = None if self._beside_target is None else self._for_target(Budget(size=sys.maxsize), graph)
        return usage_of(graph, policy, counted, self._base_bytes(graph, table, model))

    def report(self) -> str:
        """Describe the model as text: bit-widths and costs per layer and in total, accuracy, times, measured policies.

        Returns:
            The report, several lines.

        Example:
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> print(mpq.report())  # doctest: +ELLIPSIS
            test_resnet (timm), input 3×32×32
            layer ...
        """
        usage = self.usage() if self.policy is not None else None
        graph = self._policy_graph or self.graph
        expected = expected_divergence(self.scores, graph, self.policy, weight_only=self.weight_only)
        unit = self.scores.unit if self.scores is not None else ""
        budget = None
        if self.policy is not None and usage is not None:
            details = self.history.get("search", {}) if self.result is None else self.result.details
            exact = self.target is None  # a target counts a level in bit-widths of its own
            budget = allowances(str(details.get("budget", "")), graph, self.policy, usage, level_amounts=exact)
        text = report(graph, self.policy, usage, self.metrics, self.seconds, expected, unit, budget)
        text += "".join(f"\n{note}" for note in fold_notes(self.model))
        if self.result is not None and (measured := measurements(self.result)):
            text += f"\n\n{measured}"
        if (latency := self.history.get("latency")) is not None:
            text += f"\n{latency_line(latency)}"
        if self.target is not None:
            alone = " (weights only)" if self.target.weight_only else ""
            notes = [f"made for {self.target.name}{alone}", *self.target.notes(graph)]
            text += "".join(f"\n{note}" for note in notes)
        if self.policy is not None and exportable(self._manifest(self.policy)):
            text += (
                "\nall quantized layers are Linear or Embedding layers; "
                f'push_to_hub(…, format="{COMPRESSED_TENSORS}"), or `hub-mpq push … --format {COMPRESSED_TENSORS}`, '
                "publishes the model so that transformers loads it without hub-mpq"
            )
        return text

    def base_bytes(self) -> int:
        """Return the bytes of the packed file without the searched layers, which are the same for every policy.

        Returns:
            The number of bytes, header included.

        Example:
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> mpq.base_bytes() < mpq.usage("W2A2")["size"]
            True
        """
        return self._base_bytes(self.graph)

    def _base_bytes(self, graph: LayerGraph, table: Scores | None = None, model: nn.Module | None = None) -> int:
        """`base_bytes` at policies of a table's choices: the header tells inputs, groups and zero points."""
        self._check_whole()
        model = model or (self._float[0] if self._float else self.model)
        policy = longest_header(Policy.uniform(graph, "W2A32" if self.weight_only else "W2A2"), table or {})
        return base_nbytes(model, self._manifest(policy, graph))

    # saving and publishing

    def save_pretrained(self, folder: str | Path) -> int:
        """Write config.json, the packed weights and the scores into a folder, atomically.

        If the model was loaded from a folder, its tokenizer or image processor is copied too.

        Args:
            folder: Folder to write; files of an earlier save in it are replaced together, other files stay.

        Returns:
            Bytes of the packed file.

        Raises:
            InvalidArgument: The folder cannot be written.
            HubMPQError: No policy is applied yet, or the model was loaded with `runtime`.

        Example:
            >>> import torch
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            >>> nbytes = mpq.apply_policy("W4A4", [images]).save_pretrained("w4a4")
            >>> loaded = HubMPQ.from_pretrained("w4a4")
            >>> torch.equal(loaded(images), mpq(images))
            True
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
        """Publish the quantized model and its card on the Hub, in one commit.

        Args:
            repo_id: "owner/name".
            private: Whether a new repo is private; None: public. An existing repo keeps its visibility; a public one is
                refused if this is True.
            revision: Branch to publish on, created if it does not exist; None for "main".
            create_pr: Open a pull request instead; the repo must exist.
            float_copy: Also publish dequantized weights, which timm or transformers load without hub-mpq. None: yes for
                models of these libraries.
            format: "mpq", or "compressed-tensors" for a policy of a transformers model over Linear and Embedding
                layers, which transformers loads without hub-mpq.
            token: Hub token, as in huggingface_hub.
            **card: Fields of the card: `license`, `base_model`, `pipeline_tag`, `dataset` (what the figures were
                measured on), `eval_task`, `trained_on`, and the commit's `message`.

        Returns:
            The commit, with `commit_url`, `oid` and `pr_url`.

        Raises:
            InvalidArgument: The name is not "owner/name", or the format does not support this model.
            HubMPQError: No policy is applied yet, or the Hub refuses; then nothing is published.

        Example:
            >>> from hub_mpq import HubMPQ
            >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
            >>> mpq.apply_policy("W4A4").push_to_hub("me/test-resnet-w4a4", license="apache-2.0")  # doctest: +SKIP
        """
        check_repo_id(repo_id)
        # the packed file does not record the local path of its base model
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
        """Write the quantized model in the format of another program.

        Args:
            folder: New folder to write.
            format: "compressed-tensors", "gguf" or "onnx"; see `hub_mpq.export` for what each supports.

        Returns:
            Bytes that were written.

        Raises:
            InvalidArgument: The format is unknown or does not support this policy.
            HubMPQError: No policy is applied yet, or the model was loaded with `runtime`.

        Example:
            >>> import torch
            >>> from transformers import BertConfig, BertModel
            >>> from hub_mpq import HubMPQ
            >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
            >>> BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained("tiny-bert")
            >>> mpq = HubMPQ.from_pretrained("tiny-bert", weight_only=True)
            >>> mpq.apply_policy("W4A32").export("tiny-bert-ct", "compressed-tensors") > 0
            True
        """
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy before exporting")
        self._check_whole()
        source = self.source
        example = placed(source.example, self.model)
        return export(folder, format, self.model, self._manifest(self.policy), source.config, example)

    def _check_whole(self) -> None:
        """Raise HubMPQError for a model in the internal form of a runtime."""
        if (layers := getattr(self.model, "runtime_layers", None)) is not None:
            raise HubMPQError(
                f"a model loaded with runtime={layers.runtime!r} is inference-only; load it without runtime="
            )

    def _tell_transformers(self) -> None:
        """Let `mpq.model.save_pretrained` write the packed format and transformers' Trainer train `mpq.model`."""
        if self.policy is not None and libraries.get(self.source.library).pretrained_models:
            from .hub.plugin import prepare

            prepare(self.model, self._manifest(self.policy))

    def _manifest(self, policy: Policy, graph: LayerGraph | None = None) -> Manifest:
        # JSON has no NaN
        metrics = {
            of: {k: v for k, v in found.items() if isinstance(v, str) or math.isfinite(v)}
            for of, found in self.metrics.items()
        }
        provenance: dict[str, Any] = {"hub_mpq": __version__, "metrics": metrics, **self.history}
        if self._own_weights:
            provenance["weights"] = OWN_WEIGHTS
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
        # publish the name of a local folder, not its path
        base = Path(source.model_id).name if Path(source.model_id).is_dir() else source.model_id
        graph = replace(graph or self._policy_graph or self.graph, model_id=base)
        return Manifest(base, source.revision, source.library, graph, policy, provenance)

    # settings that a call may override

    @property
    def _example(self) -> Any:
        """The example input, on the current device of the model."""
        return placed(self.source.example, self._float[0] if self._float else self.model)

    def _told(self, task: TaskLike) -> dict[str, Any]:
        """Task and example input for the functions that do the work."""
        return {"task": self.task if task is None else task, "example": self._example}

    def _pinned(self, fixed: Pins | None) -> LayerGraph:
        """The graph with layers pinned or freed for one call, at widths that the target supports."""
        graph, target = self.graph.with_fixed(fixed) if fixed else self.graph, self.target
        if target is None and not self.weight_only:
            return graph
        pinned = {x.name: x.fixed for x in graph if x.fixed is not None}
        if self.weight_only:
            pinned = {name: bits.of_weight for name, bits in pinned.items()}
        if target is not None:
            if not target.weight_only:  # a pin of the user is checked, a default is fitted
                for name in {name for pattern in fixed or () for name in graph.match(pattern)} & set(pinned):
                    target.check_layer(graph[name], pinned[name])
            pinned = target.levels(graph, pinned)
        return graph.with_fixed({glob.escape(name): bits for name, bits in pinned.items()})

    def _uniform(self, level: LayerBits | str, group_size: int | None = None, symmetric: bool = True) -> Policy:
        """A level in all searched layers; with a target, the entries of its menu for that level."""
        policy = Policy.uniform(self.graph, level).with_groups(self.graph, group_size, symmetric)
        if self.target is None:
            return policy
        bits = self.target.levels(self.graph, {x.name: policy.bits[x.name] for x in self.graph.searched})
        return Policy({x.name: x.fixed or bits[x.name] for x in self.graph}, self.graph.digest)

    def _budget_here(self, budget: Budget, graph: LayerGraph) -> Budget:
        """A budget in terms of the target; InvalidArgument if its latency table is for something else."""
        if budget.latency_table is not None:
            check_table(budget.latency_table, graph, None if self.target is None else self.target.name)
        return self._for_target(budget, graph)

    def _for_target(self, budget: Budget, graph: LayerGraph) -> Budget:
        """A budget whose `size` limits the target's file, as a cost under the target's name."""
        size, target = budget.limits.get("size"), self.target
        if size is None or target is None or not target.own_size:
            return budget
        if (beside := self._beside_target) is None:
            raise InvalidArgument(f"the size of a {target.own_size} is unknown for this model; limit weight_bits")
        table = {x.name: {str(bits): float(target.nbytes(x, bits)) for bits in target.menu(x)} for x in graph}
        if isinstance(size, LayerBits):
            level = {x.name: x.fixed or target.level(x, size) for x in graph}
            size = beside + sum(table[name][str(bits)] for name, bits in level.items())
        given = {name: value for name, value in budget.given.items() if name != "size"}
        costs = {**budget.costs, target.own_size: (size, table, beside)}
        return Budget(**given, **{**budget.tables, "costs": costs})

    @cached_property
    def _beside_target(self) -> int | None:
        """Bytes of the target's file without the layers, if known."""
        if self.target is None or not self.target.own_size:
            return None
        return self.target.beside_nbytes(self._float[0] if self._float else self.model, self.graph)

    def _candidates(
        self, graph: LayerGraph, value: CandidatesLike, group_size: GroupSizes = None, symmetric: bool = True
    ) -> dict[str, Candidates]:
        """Candidates of every searched layer; of weights only if inputs stay float."""
        found = resolve_candidates(graph, value, group_size, symmetric)
        if self.target is not None:
            own = value is None
            return {name: self.target.candidates(graph[name], c, all_widths=own) for name, c in found.items()}
        if not self.weight_only:
            return found
        return {name: replace(c, activation=(FLOAT_BITS,)) for name, c in found.items()}


def _check_numbers(*, alpha: Any = None, time_limit: Any = None, validate_seconds: Any = None) -> None:
    """Raise InvalidArgument for a number out of range, before any work."""
    if alpha is not None:
        number("alpha", alpha)
    seconds("time_limit", time_limit)
    seconds("validate_seconds", validate_seconds)


def _brief(facts: Any) -> Any:
    """The strategy's details without tables of layers, which would outgrow the header's reserve, and without seconds,
    so that two runs with one seed give the same file."""
    if not isinstance(facts, Mapping):
        return facts
    return {k: v for k, v in facts.items() if not isinstance(v, (Mapping, list)) and not k.endswith("seconds")}


def _states_of(folder: str | Path, strategy: str, strategy_options: OptionsLike | None, budget: Budget | None) -> Path:
    """Folder for the states of a search: one per search, since the state of another would load silently or fail inside
    torch."""
    cls = strategy_named(strategy)
    if cls.learned_once:
        return Path(folder) / (cls.stage or cls.name)
    limits = None if budget is None else [dict(budget.given), dict(budget.costs)]
    return Path(folder) / f"search-{_mark([strategy, strategy_options, limits])}"


def _mark(tree: Any) -> str:
    """Twelve characters that stand for JSON values; an object counts by its type."""
    text = json.dumps(tree, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
