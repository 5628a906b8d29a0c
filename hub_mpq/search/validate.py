"""Measure a policy before it is returned: the optimum of the scores, uniform, other levels and other optima."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..core import FLOAT_BITS, Candidates, LayerBits, Measurement, Policy, SearchResult, Validation
from .held_out import HeldOut
from .measure import PolicyMeter
from .paired import Sums, difference_of, mean_of
from .policy_search import usage_of
from .prediction import SIGMAS, Parts, Prediction, check_prediction
from .space import SearchSpace

Z = 1.96
"""Number of paired standard errors that a measurable difference exceeds."""
LEAST_SAMPLES = 8
"""Minimum number of samples in each half; with fewer, standard errors are meaningless and nothing is validated."""
CHECKED_SAMPLES, CHECKED_TOKENS = 64, 256
"""Minimum number of samples, or items, of the choosing half for checking the prediction."""
LOW = 3.0
"""Mean bits of the operands of uniform up to which more candidates are measured."""
LEVELS = 3
"""Number of levels that are measured in addition to uniform."""
PERTURBED = 20
"""Number of optima of perturbed scores measured on a small sample, at low bit-widths or if the prediction is poor."""
FINALISTS = 3
"""Number of them that are measured on all choosing samples."""


def validated(
    result: SearchResult,
    space: SearchSpace,
    meter: PolicyMeter,
    held: HeldOut,
    *,
    candidates: Mapping[str, Candidates],
    unit: str,
    parts: Parts,
    seconds: float,
    began: float | None = None,
) -> SearchResult:
    """Return the policy that measures best, if it is measurably better than the optimum.

    All policies are compared sample by sample on the choosing half. The optimum is kept unless the divergence of
    another policy is lower by more than 1.96 paired standard errors; of several, the lowest is chosen. The figures are
    measured on the reporting half. If the chosen policy is measurably worse than uniform there, uniform is returned.
    Uniform is the most costly level that meets every limit, or the greedy fill if no level does.

    At low bit-widths, or if the scores predict random policies poorly, optima of perturbed scores and of refitted ones
    are measured too, first on a small part of the choosing half.

    Args:
        result: The optimum.
        space: The budget and the scores.
        meter: What measures policies.
        held: The two halves.
        candidates: `{searched layer: candidate bit-widths}`.
        unit: Unit of the scores.
        parts: The scores of weights and inputs, which add up to the scores.
        seconds: Time limit, after which the best policy known so far is returned. If it is too short for the optimum
            and uniform on all samples, they are compared on fewer.
        began: `time.perf_counter()` when the time began, before the meter was made; None for now.

    Returns:
        The result with its policy, measurements, check and validation.
    """
    return _Contest(result, space, meter, held, seconds, began).run(candidates, unit, parts)


class _Contest:
    """One validation: the measurements so far, and the remaining time."""

    def __init__(
        self,
        result: SearchResult,
        space: SearchSpace,
        meter: PolicyMeter,
        held: HeldOut,
        seconds: float,
        began: float | None,
    ) -> None:
        self.result, self.space, self.meter, self.held = result, space, meter, held
        self.began = time.perf_counter() if began is None else began
        self.before = meter.forwards if began is None else 0
        self.seconds = seconds
        self.longest = 0.0  # seconds of one policy on one half
        self.shortened = False  # whether the time was too short for all batches
        self.policies: dict[str, Policy] = {"optimum": result.optimum or result.policy}
        self.choosing: dict[str, Sums] = {}
        self.reporting: dict[str, Sums] = {}

    def run(self, candidates: Mapping[str, Candidates], unit: str, parts: Parts) -> SearchResult:
        levels = self.space.levels(candidates)
        uniform = f"uniform {_level(levels[0])}" if levels else "greedy fill"
        other = Policy.uniform(self.space.graph, levels[0]) if levels else self.space.greedy_fill()
        if other is None:
            return self.not_validated("no level meets the budget, and no greedy fill was found in time")
        self.policies[uniform] = other
        if self.left(1.0) <= 0 or not self.compare(uniform):
            return self.not_validated(f"{self.seconds:.3g} s was not enough time to compare the optimum with {uniform}")
        samples = [len(half["optimum"][1]) for half in (self.choosing, self.reporting)]
        if min(samples) < LEAST_SAMPLES:
            only = f"only {sum(samples)} samples "
            only += "could be measured in time" if self.shortened else "are held out"
            return self.not_validated(f"{only}, and at least {2 * LEAST_SAMPLES} are needed")
        if not any(math.isfinite(self.mean(name)) for name in self.choosing):
            return self.not_validated(f"the outputs of the optimum and of {uniform} are not finite")
        for level in _near(levels)[:LEVELS]:
            name = f"level {_level(level)}"
            self.policies[name] = Policy.uniform(self.space.graph, level)
            if self.known(name) or not self.measure(name, 0.85):
                del self.policies[name]
        prediction = self.check(unit, parts, low=_mean_width(self.space, other) <= LOW)
        better = [n for n in self.choosing if n != "optimum" and self.below(self.choosing, n, "optimum")]
        chosen = min(better, key=self.mean, default="optimum")
        for name in dict.fromkeys(("optimum", uniform, chosen, *self.choosing)):
            basic = name in ("optimum", uniform, chosen)
            if basic or (name.startswith("level") and self.left(1.0) > 0):
                self.measure(name, None, self.reporting)
        preferred = chosen
        if self.below(self.reporting, "optimum", chosen):
            chosen = "optimum"
        if self.below(self.reporting, uniform, chosen):
            chosen = uniform
        return self.finished(chosen, preferred, uniform, bool(levels), prediction)

    # what is measured

    def left(self, share: float) -> float:
        """Return the seconds until a fraction of the time is over."""
        return self.began + share * self.seconds - time.perf_counter()

    def known(self, name: str) -> bool:
        """Whether the policy has been measured under another name."""
        bits = self.policies[name].bits
        return any(other != name and self.policies[other].bits == bits for other in self.choosing)

    def measure(self, name: str, share: float | None, half: dict[str, Sums] | None = None) -> bool:
        """Measure a policy on a half, unless a fraction of the time is over; return whether it is measured."""
        half = self.choosing if half is None else half
        if name in half:
            return True
        if share is not None and (self.left(share) <= 0 or (share < 1 and self.left(1.0) <= self.longest)):
            return False
        for other, sums in half.items():
            if self.policies[other].bits == self.policies[name].bits:
                half[name] = sums
                return True
        batches = self.held.choosing if half is self.choosing else self.held.reporting
        start = time.perf_counter()
        half[name] = self.meter.measure_samples(self.policies[name], batches)
        self.longest = max(self.longest, time.perf_counter() - start)
        return True

    def compare(self, uniform: str) -> bool:
        """Measure the optimum and uniform on both halves, with fewer batches if there is not enough time for all."""
        first, start = self.held.choosing[:1], time.perf_counter()
        self.meter.measure_samples(self.policies["optimum"], first)  # computes scales, norms and references
        before = time.perf_counter()
        self.meter.measure_samples(self.policies["optimum"], first)
        cost = 3 * max(time.perf_counter() - before, 1e-9)  # the two policies and the float model
        affordable = 0.5 * max(self.left(1.0) - (before - start), 0.0) / cost  # uniform also needs scales and norms
        wanted = len(self.held.choosing) + len(self.held.reporting)
        if affordable < wanted:
            part = affordable / wanted
            choosing, reporting = (h[: max(1, int(part * len(h)))] for h in (self.held.choosing, self.held.reporting))
            self.held, self.shortened = HeldOut(choosing, reporting, self.held.data), True
        return all(
            self.measure(name, 1.0, half) for half in (self.choosing, self.reporting) for name in ("optimum", uniform)
        )

    def check(self, unit: str, parts: Parts, *, low: bool) -> Prediction | None:
        """Check the prediction; at low bit-widths or if it is poor, measure more candidates. None: too few samples."""
        counts = self.choosing["optimum"][1]
        if len(counts) < CHECKED_SAMPLES and float(counts.sum()) < CHECKED_TOKENS:
            return None
        few = self.held.few(self.meter)
        found = check_prediction(
            self.space,
            self.meter,
            few,
            unit=unit,
            parts=parts,
            seed=self.result.seed,
            refit=low,
            in_time=lambda: self.left(0.5) > 0,
        )
        if found is None or (found.check.good and not low):
            return found
        if found.refit is not None and (policy := self.space.solve(found.refit)) is not None:
            self.policies["refit"] = policy
            if self.known("refit") or not self.measure("refit", 0.85):
                del self.policies["refit"]
        pool = [
            (value, p) for p, own, value in zip(found.policies, found.perturbed, found.measured, strict=True) if own
        ]
        rng = np.random.default_rng([self.result.seed, 2])
        for _ in range(PERTURBED):
            if self.left(0.75) <= 0:
                break
            policy = self.space.perturbed(rng, float(rng.uniform(*SIGMAS)))
            if policy is not None and all(policy.bits != p.bits for _, p in pool):
                sums, counts = self.meter.measure_samples(policy, few)
                pool.append((float(sums.sum() / counts.sum()), policy))
        pool.sort(key=lambda row: row[0] if math.isfinite(row[0]) else math.inf)
        for i, (_, policy) in enumerate(pool[:FINALISTS]):
            name = f"perturbed {i + 1}"
            self.policies[name] = policy
            if self.known(name) or not self.measure(name, 0.85):
                del self.policies[name]
        return found

    # the result

    def mean(self, name: str) -> float:
        return mean_of(self.choosing[name])[0]

    def below(self, half: Mapping[str, Sums], name: str, other: str) -> bool:
        """Whether a policy is measurably better than another."""
        difference, error = difference_of(half[name], half[other])
        return difference < -Z * error

    def not_validated(self, why: str) -> SearchResult:
        said = Validation(False, why, self.held.data, seconds=self.spent(), forwards=self.meter.forwards - self.before)
        return replace(self.result, validation=said)

    def spent(self) -> float:
        return time.perf_counter() - self.began

    def finished(
        self, chosen: str, preferred: str, uniform: str, level: bool, prediction: Prediction | None
    ) -> SearchResult:
        rows = []
        for name, sums in self.reporting.items():
            value, error = mean_of(sums)
            difference = (0.0, 0.0) if name == "optimum" else difference_of(sums, self.reporting["optimum"])
            policy = self.policies[name]
            counted = (len(sums[1]), int(sums[1].sum()))
            rows.append(
                Measurement(name, policy, self.space.predicted(policy), value, error, *difference, *counted),
            )
        said = Validation(
            True,
            self.verdict(chosen, preferred, uniform, level),
            self.held.data,
            len(self.choosing["optimum"][1]),
            len(self.reporting["optimum"][1]),
            self.spent(),
            self.meter.forwards - self.before,
        )
        policy = self.policies[chosen]
        return replace(
            self.result,
            policy=policy,
            usage=usage_of(self.space.graph, policy, self.space.budget, self.space.base_bytes),
            chosen_by=chosen if chosen.startswith("level") or chosen == "greedy fill" else chosen.split()[0],
            measurements=tuple(rows),
            check=None if prediction is None else prediction.check,
            validation=said,
        )

    def verdict(self, chosen: str, preferred: str, uniform: str, level: bool) -> str:
        beside = "" if level else " (no level meets each limit)"
        if self.policies["optimum"].bits == self.policies[uniform].bits:
            same = f"the optimum is {uniform} itself{beside}"
            if chosen in ("optimum", uniform):
                return same
            return f"{same}, and {chosen} is returned because it measured better{self.confirmed(chosen)}"
        if chosen != preferred:
            return (
                f"{_the(chosen)} is returned{beside} because it measured better on the reporting samples than "
                f"{_the(preferred)}, which was chosen on the choosing samples"
            )
        if chosen != "optimum":
            text = f"{chosen} is returned because it measured better than the optimum{self.confirmed(chosen)}"
            return text + beside if chosen == uniform else f"{text}, and not worse than {uniform}{beside}"
        if self.below(self.reporting, "optimum", uniform):
            return f"the optimum is kept because it measured better than {uniform}{beside}"
        return f"the optimum is kept because its difference from {uniform}{beside} is within noise"

    def confirmed(self, chosen: str) -> str:
        """Return a note if the reporting samples do not confirm the choosing ones, else ""."""
        if self.below(self.reporting, chosen, "optimum"):
            return ""
        return " on the choosing samples (on the reporting ones the difference is within noise)"


def _near(levels: list[LayerBits]) -> list[LayerBits]:
    """Return the levels after the first that no other one exceeds in both bit-widths."""

    def exceeded(x: LayerBits) -> bool:
        return any(y != x and y.weight >= x.weight and y.activation >= x.activation for y in levels)

    return [level for level in levels[1:] if not exceeded(level)]


def _mean_width(space: SearchSpace, policy: Policy) -> float:
    """Return the mean bits of the quantized operands of searched layers."""
    widths = [b for x in space.graph.searched for b in (policy.bits[x.name].weight, policy.bits[x.name].activation)]
    return float(np.mean([b for b in widths if b != FLOAT_BITS]))


def _level(level: LayerBits) -> str:
    return str(level).removesuffix(f"A{FLOAT_BITS}")


def _the(name: str) -> str:
    return f"the {name}" if name == "optimum" else name
