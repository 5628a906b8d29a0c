"""From a model to policies: indicators, scores, one budget or a front."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.trace import norm_of
from ..core import FLOAT_BITS, Budget, Candidates, Indicators, LayerBits, SearchResult
from ..errors import HubMPQError, InvalidArgument
from ..search.candidates import CandidatesLike
from ..search.joint import first_batch, train_indicators
from ..search.policy_search import pareto_front, search_policy
from ..search.problem import build
from ..search.scores import default_alpha, limpq_scores
from ..search.synthetic_data import synthetic_batch
from ..search.train_scores import StrategyScores, train_scores
from .held import Held, Pins


class Searching(Held):
    """The steps that leave the model as it is."""

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
        resolved = self._candidates(candidates)
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
        resolved = self._candidates(candidates)
        options |= {"strategy": strategy, "budget": aim, "base_bytes": self.base_bytes()}
        self.learned = train_scores(model, self.graph, norms, train, resolved, **options)
        self.seconds[self.learned.strategy] = self.learned.provenance["seconds"]
        return self.learned

    def scores(self, alpha: float | None = None, candidates: CandidatesLike = None) -> tuple[Any, float]:
        """({searched layer: {widths: score}}, α) from the indicators, smaller is better; arguments as in `search`.

        Of another strategy's scores (`learned`): α is 0, and `learned.sense` tells which way is better.
        """
        if self.learned is not None:
            return self.learned.within(None if candidates is None else self._candidates(candidates)), 0.0
        if self.indicators is None:
            raise HubMPQError("there are no indicators yet; call train_indicators first, or quantize")
        if candidates is None:
            resolved = {
                x.name: Candidates(
                    tuple(self.indicators.weight.get(x.name, (2,))),
                    (FLOAT_BITS,) if self.weight_only else tuple(self.indicators.activation.get(x.name, (FLOAT_BITS,))),
                )
                for x in self.graph.searched
            }
        else:
            resolved = self._candidates(candidates)
        used = default_alpha(self.indicators) if alpha is None else alpha
        return limpq_scores(self.indicators, self.graph, resolved, used), used

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
        if alpha is not None and self.learned is not None:
            raise InvalidArgument(f"alpha weighs LIMPQ's indicators; scores of {self.learned.strategy!r} take none")
        self._pin(fixed)
        scores, used = self.scores(alpha, candidates)
        base = self.base_bytes()
        told = ", ".join(f"{name} {value}" for name, value in budget.items() if value is not None and name != "costs")
        result = search_policy(
            self.graph,
            scores,
            wanted,
            base_bytes=base,
            time_limit=time_limit,
            **({"details": {"alpha": used}} if self.learned is None else self.learned.search_options),
        )
        result = replace(result, details={**result.details, "budget": told})
        self.seconds["search"] = result.seconds
        return result

    def check_reachable(self, candidates: CandidatesLike = None, *, strategy: str | None = None, **budget: Any) -> None:
        """Raise InfeasibleBudget when no policy of the candidates meets the budget; needs no indicators.

        strategy: the one that is going to search; None: with the scores that are there, if any.
        """
        known = self.indicators is not None if strategy == "limpq" else strategy is None and self._has_scores
        if known:
            self.search(candidates=candidates, **budget)
            return
        resolved = self._candidates(candidates)
        scores = {
            layer.name: {
                LayerBits(weight, activation): 0.0
                for weight in resolved[layer.name].weight
                for activation in ((FLOAT_BITS,) if layer.weight_only else resolved[layer.name].activation)
            }
            for layer in self.graph.searched
        }
        build(self.graph, scores, Budget(**budget), base_bytes=self.base_bytes()).solve()

    @property
    def _has_scores(self) -> bool:
        return self.indicators is not None or self.learned is not None

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

    def _ensure_indicators(
        self,
        train: Any,
        candidates: CandidatesLike,
        options: Mapping[str, Any] | None,
        seed: int,
        checkpoint_dir: str | Path | None,
        resume: bool,
    ) -> None:
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
