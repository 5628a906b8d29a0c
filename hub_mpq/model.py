"""HubMPQ: a hub model together with its mixed-precision policy."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import __version__, adapters
from .adapters.base import Source
from .adapters.trace import norm_of
from .cost.size import layer_nbytes
from .errors import HubMPQError, InvalidArgument
from .hub.export import export
from .hub.folder import predicted_nbytes, read_folder_indicators, save_folder
from .hub.load import load_folder
from .hub.publish import publish
from .hub.pull import packed_folder
from .hub.remote import check_repo_id
from .nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs
from .nn.swap import swap_policy
from .pack import Manifest
from .report import report
from .search.candidates import CandidatesLike, resolve_candidates
from .search.datafree import synthetic_batch
from .search.joint import first_batch, train_indicators
from .search.policy_search import pareto_front, search_policy, usage_of
from .search.scores import default_alpha, limpq_scores
from .search.train_scores import StrategyScores, train_scores
from .spec import Budget, Candidates, Indicators, LayerBits, LayerGraph, Policy, SearchResult, Usage
from .train.batch import forward, labels_of, to_device
from .train.evaluate import evaluate
from .train.loop import TrainLog
from .train.norms import reestimate_batch_norm
from .train.tune import finetune

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

Pins = Mapping[str, LayerBits | str | None]


class HubMPQ(nn.Module):
    """A timm or Hugging Face model (or any network) and, once searched for, its policy.

    `model`: the network that runs: float until a policy is applied, then quantized. `graph`: its layers.
    `policy`, `indicators`, `learned` (scores of another
    strategy than LIMPQ), `result`: None until there are any. `metrics`: {"float" | "quantized": figures}.
    """

    def __init__(self, source: Source, *, fixed: Pins | None = None) -> None:
        super().__init__()
        self.model = source.model
        self.source = source
        self.graph: LayerGraph = source.graph.with_fixed(fixed or {})
        self.policy: Policy | None = None
        self.indicators: Indicators | None = None
        self.learned: StrategyScores | None = None
        self.result: SearchResult | None = None
        self.metrics: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        # in a tuple: the float model is no submodule, or every state dict would hold it too
        self._float: tuple[nn.Module, ...] = (source.model,)

    # -- where models come from ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        module: nn.Module | None = None,
        fixed: Pins | None = None,
        exclude: Iterable[str] = (),
        pretrained: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> HubMPQ:
        """A timm name, a Hugging Face id, "hf-hub:…", a local folder, or what save_pretrained or push_to_hub wrote.

        Of a published packed model only its config, packed weights, indicators and preprocessing are fetched; pinned
        to a commit (revision=) that is in the cache, nothing is asked of the network.

        module: the network itself, for a packed model that no hub can build. fixed: {name or pattern:
        "W8A8" or None} changes which layers keep their widths. exclude: patterns of layers to leave float.
        pretrained, checkpoint_path and other keywords go to timm or transformers.
        """
        where = {"revision": revision, "token": token, "local_files_only": local_files_only}
        folder = packed_folder(model_id, **where) if pretrained else None  # type: ignore[arg-type]
        if folder is not None:
            return cls._of_folder(folder, module, kwargs)
        kwargs |= {key: value for key, value in where.items() if value}
        source = adapters.load(str(model_id), pretrained=pretrained, exclude=exclude, **kwargs)
        out = cls(source, fixed=fixed)
        if Path(model_id).is_dir():
            out.indicators = read_folder_indicators(model_id)
        return out

    @classmethod
    def from_module(
        cls,
        net: nn.Module,
        example_input: Any,
        *,
        model_id: str | None = None,
        fixed: Pins | None = None,
        exclude: Iterable[str] = (),
    ) -> HubMPQ:
        """Any network; `example_input` is one batch as it takes it. The network itself stays float."""
        return cls(adapters.from_module(net, example_input, model_id=model_id, exclude=exclude), fixed=fixed)

    @classmethod
    def _of_folder(cls, folder: Path, module: nn.Module | None, kwargs: Mapping[str, Any]) -> HubMPQ:
        source, manifest = load_folder(folder, module, kwargs)
        out = cls(source)
        out.policy, out._float = manifest.policy, ()
        out.indicators = read_folder_indicators(folder)
        out.metrics = {k: dict(v) for k, v in manifest.provenance.get("metrics", {}).items()}
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

    # -- the steps ---------------------------------------------------------------------------------------------------

    def train_indicators(
        self, train: Iterable[Any], *, candidates: CandidatesLike = None, fixed: Pins | None = None, **options: Any
    ) -> Indicators:
        """Learn every layer's importance at every candidate width; serves every later budget.

        train: batches (inputs, labels), dicts with labels, or inputs alone (then by distillation). Options as in
        hub_mpq.search.joint.train_indicators: epochs, steps, share, preset, lr, scale_lr, freeze_weights, seed,
        checkpoint_dir, resume, …
        """
        self._pin(fixed)
        model = self.float_model
        began = time.perf_counter()
        with torch.no_grad():
            norms = norm_of(model, self.source.example)
        resolved = resolve_candidates(self.graph, candidates)
        self.indicators = train_indicators(model, self.graph, norms, train, resolved, **options)
        self.learned, self.seconds["indicators"] = None, time.perf_counter() - began
        return self.indicators

    def train_scores(
        self,
        train: Iterable[Any],
        *,
        strategy: str,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        budget: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> StrategyScores:
        """Scores of a strategy of the registry ("dq", "ebs", "seam", "bsq", "gradient", "hessian", "mse", "kl", or one
        of your own, "file.py:name"); later searches use them until indicators are trained.

        budget: what a strategy with a penalty aims at, as in `search`. Options as in hub_mpq.search.train_scores:
        strategy_options, epochs, steps, share, lr, seed, checkpoint_dir, resume, …
        """
        self._pin(fixed)
        model = self.float_model
        with torch.no_grad():
            norms = norm_of(model, self.source.example)
        aim = Budget(**budget) if budget else None
        resolved = resolve_candidates(self.graph, candidates)
        options |= {"strategy": strategy, "budget": aim, "base_bytes": self.base_bytes()}
        self.learned = train_scores(model, self.graph, norms, train, resolved, **options)
        self.seconds[self.learned.strategy] = self.learned.provenance["seconds"]
        return self.learned

    def search(
        self,
        *,
        alpha: float | None = None,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        time_limit: float | None = None,
        **budget: Any,
    ) -> SearchResult:
        """The best policy within a budget (bitops=, size=, compression=, weight_bits=, activation_memory=, costs=).

        Does not change the model. alpha: weight of weight indicators; None balances the sums. Raises
        InfeasibleBudget with the least reachable value of each limit.
        """
        wanted = Budget(**budget)
        self._pin(fixed)
        scores, used = self.scores(alpha, candidates)
        base = self.base_bytes()
        result = search_policy(
            self.graph,
            scores,
            wanted,
            base_bytes=base,
            time_limit=time_limit,
            **({"details": {"alpha": used}} if self.learned is None else self.learned.search_options),
        )
        self.seconds["search"] = result.seconds
        return result

    def pareto(
        self,
        limit: str = "bitops",
        points: int = 20,
        *,
        alpha: float | None = None,
        candidates: CandidatesLike = None,
        **budget: Any,
    ) -> list[SearchResult]:
        """Best policies along one limit, other limits kept (all as in `search`)."""
        scores, _ = self.scores(alpha, candidates)
        others = Budget(**budget) if budget else None
        settings = {} if self.learned is None else {**self.learned.search_options}
        settings.pop("details", None)
        return pareto_front(
            self.graph, scores, limit=limit, points=points, base_bytes=self.base_bytes(), others=others, **settings
        )

    def apply_policy(
        self,
        policy: Policy | LayerBits | str,
        calibration: Iterable[Any] | None = None,
        *,
        batches: int = 4,
        per_channel: bool = True,
        reestimate_norms: bool = True,
    ) -> HubMPQ:
        """Quantize a copy of the float model at a policy, scales of least squared error on a few batches.

        policy: a Policy, or a level ("W4A4") for all searched layers. calibration None: synthetic inputs.
        per_channel: one weight scale per output channel, else per tensor. reestimate_norms: re-estimate BatchNorm
        statistics too, on up to 16 batches of `calibration`.
        """
        if not isinstance(policy, Policy):
            policy = Policy.uniform(self.graph, policy)
        model = copy.deepcopy(self.float_model)
        swap_policy(model, self.graph, policy, per_channel=per_channel)
        device = next(model.parameters()).device
        data = [synthetic_batch(self.float_model, self.source.example)] if calibration is None else calibration
        taken = [to_device(batch, device) for batch, _ in zip(data, range(batches), strict=False)]
        if not taken:
            raise InvalidArgument("the calibration data are empty")
        calibrate_weights(model, mse=True)
        calibrate_inputs(model, sample_inputs(model, taken, forward), mse=True)
        if calibration is not None and reestimate_norms:
            reestimate_batch_norm(model, calibration, limit=16)
        self.model, self.policy = model.eval(), policy
        self.metrics.pop("quantized", None)
        self._tell_transformers()
        return self

    def finetune(self, train: Iterable[Any], **options: Any) -> TrainLog:
        """Train the quantized model in place. Options as in hub_mpq.train.tune.finetune."""
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy first")
        teacher = self._float[0] if self._float else None
        log = finetune(self.model, train, teacher=teacher, **options)
        self.seconds["finetune"] = log.seconds
        return log

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Top-1 / top-5, loss / perplexity, or fidelity to the float model when there are no labels."""
        figures = evaluate(self.model, loader, reference=self._float[0] if self._float else None)
        self.metrics["quantized" if self.policy is not None else "float"] = figures
        return figures

    def quantize(
        self,
        *,
        train: Iterable[Any] | None = None,
        val: Iterable[Any] | None = None,
        epochs: float = 1,
        steps: int | None = None,
        strategy: str = "limpq",
        strategy_options: Mapping[str, Any] | None = None,
        indicators: Indicators | None = None,
        indicator_options: Mapping[str, Any] | None = None,
        alpha: float | None = None,
        candidates: CandidatesLike = None,
        fixed: Pins | None = None,
        per_channel: bool = True,
        seed: int = 0,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        finetune_options: Mapping[str, Any] | None = None,
        **budget: Any,
    ) -> HubMPQ:
        """Indicators → policy → quantizers in → fine-tuned, in one call; returns self.

        Budget as in `search`. train: batches to train on; without any, stored indicators or a data-free calibration
        serve, with one warning. epochs, steps: length of fine-tuning (epochs=0: calibration only).
        indicator_options, finetune_options: as in train_indicators and finetune. checkpoint_dir, resume: go on after
        an interruption. strategy, strategy_options: another search than LIMPQ's, which `indicator_options` then times;
        one that infers widths (DQ, BSQ) needs no budget.
        """
        if budget or strategy == "limpq":
            Budget(**budget)  # a nonsense budget must not cost a training first
        self._pin(fixed)
        if val is not None and "float" not in self.metrics and labels_of(first_batch(val)) is not None:
            self.metrics["float"] = evaluate(self.float_model, val)
        if strategy == "limpq":
            self.learned = None
            self._ensure_indicators(train, indicators, candidates, indicator_options, seed, checkpoint_dir, resume)
        else:
            chosen = {"seed": seed, "resume": resume, "strategy_options": strategy_options, **(indicator_options or {})}
            if checkpoint_dir:
                chosen.setdefault("checkpoint_dir", Path(checkpoint_dir) / "search")
            data = [synthetic_batch(self.float_model, self.source.example, seed)] if train is None else train
            self.train_scores(data, strategy=strategy, candidates=candidates, budget=budget, **chosen)
        result = self.search(alpha=alpha, candidates=candidates, **budget) if budget else None
        policy = result.policy if result else self.learned.inferred_policy(self.graph)  # type: ignore[union-attr]
        tuned = train is not None and (epochs > 0 if steps is None else steps > 0)
        # fine-tuning starts from the float BatchNorm (LIMPQ) and re-estimates at its end
        self.apply_policy(policy, train, per_channel=per_channel, reestimate_norms=not tuned)
        self.result = result
        self._tell_transformers()
        if train is not None and tuned:
            folder = Path(checkpoint_dir) / "finetune" if checkpoint_dir else None
            options = {"epochs": epochs, "steps": steps, "seed": seed, "checkpoint_dir": folder, "resume": resume}
            self.finetune(train, **{**options, **(finetune_options or {})})
        if val is not None:
            self.evaluate(val)
        return self

    # -- what it costs, and saving ------------------------------------------------------------------------------------

    def usage(self, policy: Policy | LayerBits | str | None = None) -> Usage:
        """Whole-model cost of a policy (default: the one applied)."""
        policy = policy or self.policy
        if policy is None:
            raise HubMPQError("there is no policy yet")
        if not isinstance(policy, Policy):
            policy = Policy.uniform(self.graph, policy)
        return usage_of(self.graph, policy, None, self.base_bytes())

    def report(self) -> str:
        """Widths, BitOps and bytes per layer and in all, accuracy before and after, seconds of each stage."""
        usage = self.usage() if self.policy is not None else None
        return report(self.graph, self.policy, usage, self.metrics, self.seconds)

    def save_pretrained(self, folder: str | Path) -> int:
        """Write config.json, packed weights and indicators atomically into a folder; returns the packed bytes."""
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy before saving")
        return save_folder(folder, self.model, self._manifest(self.policy), self.source.config, self.indicators)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        float_copy: bool | None = None,
        token: str | bool | None = None,
        **card: str | None,
    ) -> CommitInfo:
        """Publish the quantized model as "owner/name" in one commit; all arguments as in hub_mpq.hub.publish.publish.

        float_copy: dequantized weights too, that plain timm or transformers load (None: for their models, yes).
        card: license, base_model, dataset, eval_task, trained_on, message.
        """
        check_repo_id(repo_id)
        with tempfile.TemporaryDirectory(prefix="hub-mpq-") as folder:
            self.save_pretrained(folder)
            return publish(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                float_copy=float_copy,
                token=token,
                model=self.model,
                **card,
            )

    def export(self, folder: str | Path, format: str) -> int:
        """Write the quantized model for other programs: format "compressed-tensors" or "onnx"; returns the bytes.

        Formats, and what each refuses, are described in hub_mpq.hub.export.
        """
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy before exporting")
        source = self.source
        return export(folder, format, self.model, self._manifest(self.policy), source.config, source.example)

    def _tell_transformers(self) -> None:
        """So that `mpq.model.save_pretrained` writes the packed format and transformers' Trainer trains `mpq.model`."""
        if self.source.library == "transformers" and self.policy is not None:
            from .hub.plugin import prepare

            prepare(self.model, self._manifest(self.policy))

    def _manifest(self, policy: Policy) -> Manifest:
        provenance: dict[str, Any] = {"hub_mpq": __version__, "metrics": self.metrics}
        if self.result is not None:
            details = self.result
            provenance["search"] = {
                "strategy": details.strategy,
                "status": details.status,
                "objective": details.objective,
                "gap": details.gap,
                "seed": details.seed,
                **details.details,
            }
        source = self.source
        return Manifest(source.model_id, source.revision, source.library, self.graph, policy, provenance)

    def base_bytes(self) -> int:
        """Bytes of the packed file beside the searched layers, the same at every policy."""
        policy = Policy.uniform(self.graph, "W2A2")
        model = self._float[0] if self._float else self.model
        searched = sum(layer_nbytes(layer, policy.bits[layer.name]) for layer in self.graph.searched)
        return predicted_nbytes(model, self._manifest(policy)) - searched

    def _pin(self, fixed: Pins | None) -> None:
        if fixed:
            self.graph = self.graph.with_fixed(fixed)

    def scores(self, alpha: float | None = None, candidates: CandidatesLike = None) -> tuple[Any, float]:
        """({searched layer: {widths: score}}, α) from the indicators, smaller is better; arguments as in `search`.

        Of another strategy's scores (`learned`): α is 0, and `learned.sense` tells which way is better.
        """
        if self.learned is not None:
            return self.learned.within(None if candidates is None else resolve_candidates(self.graph, candidates)), 0.0
        if self.indicators is None:
            raise HubMPQError("there are no indicators yet; call train_indicators first, or quantize")
        if candidates is None:
            resolved = {
                x.name: Candidates(
                    tuple(self.indicators.weight.get(x.name, (2,))), tuple(self.indicators.activation.get(x.name, (2,)))
                )
                for x in self.graph.searched
            }
        else:
            resolved = resolve_candidates(self.graph, candidates)
        used = default_alpha(self.indicators) if alpha is None else alpha
        return limpq_scores(self.indicators, self.graph, resolved, used), used

    def _ensure_indicators(
        self,
        train: Any,
        given: Indicators | None,
        candidates: CandidatesLike,
        options: Mapping[str, Any] | None,
        seed: int,
        checkpoint_dir: str | Path | None,
        resume: bool,
    ) -> None:
        if given is not None:
            self.indicators = given
        if self.indicators is not None:
            return
        chosen = {"seed": seed, "resume": resume, **(options or {})}
        if checkpoint_dir:
            chosen.setdefault("checkpoint_dir", Path(checkpoint_dir) / "indicators")
        if train is None:
            warnings.warn(
                "no data and no stored indicators: calibrating on synthetic inputs, with scales that were not trained; "
                "pass train= for a policy that was learned",
                stacklevel=3,
            )
            train, chosen = [synthetic_batch(self.float_model, self.source.example, seed)], {"steps": 0, "seed": seed}
        else:
            first_batch(train)
        self.train_indicators(train, candidates=candidates, **chosen)
