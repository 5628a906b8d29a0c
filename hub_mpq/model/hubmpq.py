"""HubMPQ: a hub model together with its mixed-precision policy."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import adapters
from ..core import Budget, Indicators, LayerBits, Policy
from ..errors import HubMPQError, InvalidArgument
from ..hub.folder import read_folder_indicators
from ..hub.load import load_folder
from ..hub.pull import packed_folder
from ..nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs
from ..nn.quantize import quantize_to_policy
from ..search.candidates import CandidatesLike
from ..search.joint import first_batch
from ..search.strategy import infers_widths
from ..search.synthetic_data import synthetic_batch
from ..train.batch import forward, labels_of, to_device
from ..train.engine import Engine
from ..train.evaluate import evaluate
from ..train.loop import TrainLog
from ..train.norms import reestimate_batch_norm
from ..train.processes import on_main, seeded
from ..train.tune import finetune
from .held import Pins
from .sharing import Sharing

_TOLD = ("seed", "lr", "scale_lr", "distill", "smoothing", "ema", "cyclic_bits", "gradient_bits")
"""Options of fine-tuning that a card tells, where they were given."""


def _mark(tree: Any) -> str:
    """Twelve characters that stand for JSON values; an object counts by its type."""
    text = json.dumps(tree, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class HubMPQ(Sharing):
    """A timm or Hugging Face model (or any network) and, once searched for, its policy.

    `model`: the network that runs: float until a policy is applied, then quantized. `graph`: its layers.
    `policy`, `indicators`, `learned` (scores of another strategy than LIMPQ), `result`: None until there are any.
    `metrics`: {"float" | "quantized": figures}. `seconds`: {stage: wall time}.
    """

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        module: nn.Module | None = None,
        fixed: Pins | None = None,
        exclude: Iterable[str] = (),
        weight_only: bool = False,
        tie_fused: bool = False,
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
        weight_only: all inputs stay float, fixed layers' too. tie_fused: layers of one module that read one input
        (q, k, v; gate, up) share the weight width, as runtimes that fuse them (vLLM) need.
        pretrained, checkpoint_path and other keywords go to timm or transformers.
        """
        where = {"revision": revision, "token": token, "local_files_only": local_files_only}
        folder = packed_folder(model_id, **where) if pretrained else None  # type: ignore[arg-type]
        if folder is not None:
            return cls._of_folder(folder, module, kwargs)
        kwargs |= {key: value for key, value in where.items() if value}
        source = adapters.load(str(model_id), pretrained=pretrained, exclude=exclude, **kwargs)
        out = cls(source, fixed=fixed, weight_only=weight_only, tie_fused=tie_fused)
        if Path(model_id).is_dir():
            out.home = Path(model_id)
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
        weight_only: bool = False,
        tie_fused: bool = False,
    ) -> HubMPQ:
        """Any network; `example_input` is one batch as it takes it. The network itself stays float.

        Other arguments as in `from_pretrained`.
        """
        source = adapters.from_module(net, example_input, model_id=model_id, exclude=exclude)
        return cls(source, fixed=fixed, weight_only=weight_only, tie_fused=tie_fused)

    @classmethod
    def _of_folder(cls, folder: Path, module: nn.Module | None, kwargs: Mapping[str, Any]) -> HubMPQ:
        source, manifest = load_folder(folder, module, kwargs)
        out = cls(source)
        out.policy, out._float, out.home = manifest.policy, (), folder
        out.indicators = read_folder_indicators(folder)
        out.metrics = {k: dict(v) for k, v in manifest.provenance.get("metrics", {}).items()}
        out.made = {k: dict(v) for k, v in manifest.provenance.items() if k in ("search", "finetune")}
        out._tell_transformers()
        return out

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
        quantize_to_policy(model, self.graph, policy, per_channel=per_channel)
        device = next(model.parameters()).device
        data = [synthetic_batch(self.float_model, self.source.example)] if calibration is None else seeded(calibration)
        taken = [to_device(batch, device) for batch, _ in zip(data, range(batches), strict=False)]
        if not taken:
            raise InvalidArgument("the calibration data are empty")
        calibrate_weights(model, mse=True)
        calibrate_inputs(model, sample_inputs(model, taken, forward), mse=True)
        if calibration is not None and reestimate_norms:
            reestimate_batch_norm(model, seeded(calibration), limit=16)
        self.model, self.policy = model.eval(), policy
        self.result, self.made = None, {}
        self.metrics.pop("quantized", None)
        self._tell_transformers()
        return self

    def finetune(self, train: Iterable[Any], **options: Any) -> TrainLog:
        """Train the quantized model in place. Options as in hub_mpq.train.tune.finetune."""
        if self.policy is None:
            raise HubMPQError("there is no policy yet; call quantize or apply_policy first")
        teacher = self._float[0] if self._float else None
        self.metrics.pop("quantized", None)  # they were the model's before
        log = finetune(self.model, train, teacher=teacher, **options)
        self.seconds["finetune"] = log.seconds
        told = {k: v for k, v in options.items() if k in _TOLD and v is not None}
        self.made["finetune"] = {"steps": log.steps, "samples": log.samples, **told}
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
        engine: Engine | None = None,
        **budget: Any,
    ) -> HubMPQ:
        """Indicators → policy → quantizers in → fine-tuned, in one call; returns self.

        Budget as in `search`. train: batches to train on; without any, stored indicators or a data-free calibration
        serve, with one warning. epochs, steps: length of fine-tuning (epochs=0: calibration only).
        indicator_options, finetune_options: as in train_indicators and finetune. checkpoint_dir, resume: go on after
        an interruption. strategy, strategy_options: another search than LIMPQ's, which `indicator_options` then times;
        one that infers widths (DQ, BSQ) needs no budget. engine: how the trainings run (precision, memory, trackers).
        """
        tuned = train is not None and (epochs > 0 if steps is None else steps > 0)
        if tuned and engine is not None and engine.fsdp:
            raise InvalidArgument("fsdp trains indicators; fine-tuning runs without it, so give epochs=0")
        if budget or not infers_widths(strategy):
            Budget(**budget)  # none where one is needed, or nonsense, must not cost a training first
        if strategy == "limpq" and strategy_options:
            raise InvalidArgument("strategy 'limpq' takes its options as indicator_options")
        self._pin(fixed)
        if indicators is not None:
            self.indicators = indicators
        if strategy == "limpq":
            self.learned = None
        if budget:
            self.check_reachable(candidates, strategy=strategy, **budget)
        if val is not None and "float" not in self.metrics and labels_of(first_batch(val)) is not None:
            self.metrics["float"] = evaluate(self.float_model, val)
        if strategy == "limpq":
            told = {"engine": engine, **(indicator_options or {})}
            self._ensure_indicators(train, candidates, told, seed, checkpoint_dir, resume)
        else:
            chosen: dict[str, Any] = {"seed": seed, "resume": resume, "engine": engine}
            chosen |= {"strategy_options": strategy_options, **(indicator_options or {})}
            if checkpoint_dir:
                # by search: the state of another one would load without a word, or fail in torch's
                mark = _mark([strategy, strategy_options, budget])
                chosen.setdefault("checkpoint_dir", Path(checkpoint_dir) / f"search-{mark}")
            if train is None:
                warnings.warn("no data: searching and calibrating on synthetic inputs; pass train=", stacklevel=2)
            data = [synthetic_batch(self.float_model, self.source.example, seed)] if train is None else train
            self.train_scores(data, strategy=strategy, candidates=candidates, budget=budget, **chosen)
        # of several processes one searches: a time limit could end them at other policies
        result = on_main(lambda: self.search(alpha=alpha, candidates=candidates, **budget)) if budget else None
        policy = result.policy if result else self.learned.inferred_policy(self.graph)  # type: ignore[union-attr]
        # fine-tuning starts from the float BatchNorm (LIMPQ) and re-estimates at its end
        self.apply_policy(policy, train, per_channel=per_channel, reestimate_norms=not tuned)
        self.result = result
        self._tell_transformers()
        if train is not None and tuned:
            # by policy: a state of other widths would load without a word
            folder = Path(checkpoint_dir) / f"finetune-{_mark(policy.to_dict())}" if checkpoint_dir else None
            options = {"epochs": epochs, "steps": steps, "seed": seed, "checkpoint_dir": folder, "resume": resume}
            self.finetune(train, **{**options, "engine": engine, **(finetune_options or {})})
        if val is not None:
            self.evaluate(val)
        return self
