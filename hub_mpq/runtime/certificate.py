"""Whether a runtime computes the same model: each layer against its exact result, and the metric of the task.

A whole network is no measure of that: one code that falls on the other side of a tie moves what follows. So a layer's
output on the runtime is compared with the exact result, integers added up in float64, for the input that it got there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import RuntimeLayers
from .fused_layer import FusedLayer, affine
from .integer_layer import Grid, integer_layers
from .machine import machine

LARGEST_ERROR = 1e-5
"""Of a float32 output, relative to the largest output of the layer."""
LARGEST_FLIPS = 1e-3
"""Share of codes that differ by one step: those that lie on a tie up to float32's rounding."""
LARGEST_ITEMS = 1e-3
"""Of a metric, in items: one in a thousand."""


@dataclass(frozen=True, eq=False)
class LayerRun:
    """What one layer got and gave in one run.

    Args:
        plan: The layer and what it takes along.
        codes: Of the input, as the runtime made them.
        output: Float32, or codes where `plan.output` says so.
        summand: What was added, float32.
        source: The float32 input that the runtime made the codes of, where it made them for this layer.
    """

    plan: FusedLayer
    codes: Tensor
    output: Tensor
    summand: Tensor | None = None
    source: Tensor | None = None


@dataclass(frozen=True)
class LayerCheck:
    """How far a layer is from its exact result.

    Args:
        error: The largest difference of a float32 output over the largest output; 0 for codes.
        flips: How many codes (made by the layer, or of its input) differ by one step.
        wrong: How many codes differ by more, or how many outputs by more than `LARGEST_ERROR`: saturation, or a fault.
        codes: How many codes were compared.
    """

    error: float = 0.0
    flips: int = 0
    wrong: int = 0
    codes: int = 0

    def __or__(self, other: LayerCheck) -> LayerCheck:
        sums = (self.flips + other.flips, self.wrong + other.wrong, self.codes + other.codes)
        return LayerCheck(max(self.error, other.error), *sums)


@dataclass(frozen=True)
class Certificate:
    """What was measured of a runtime against the reference.

    Args:
        runtime: Its name.
        layers: {layer that computes in integers: check}.
        float: {layer that computes in float: why}.
        metrics: {"reference" | "runtime": figures of the task}; empty where they were not measured.
        reasons: Why it is not the same model, one sentence each; empty when it is.
    """

    runtime: str
    layers: Mapping[str, LayerCheck]
    float: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether it is the same model by the bounds of this module."""
        return not self.reasons

    @property
    def total(self) -> LayerCheck:
        """All layers together."""
        whole = LayerCheck()
        for check in self.layers.values():
            whole |= check
        return whole

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {"exact": self.exact, **asdict(self), "reasons": list(self.reasons)}

    def summary(self) -> dict[str, Any]:
        """What a card says of it, JSON values only."""
        whole = self.total
        return {
            "exact": self.exact,
            "machine": machine(),
            "integer layers": len(self.layers),
            "float layers": len(self.float),
            "largest error": whole.error,
            "codes one step off": whole.flips / whole.codes if whole.codes else 0.0,
            "values wrong": whole.wrong,
            "metrics": {of: dict(found) for of, found in self.metrics.items()},
        }

    def __str__(self) -> str:
        whole = self.total
        share = whole.flips / whole.codes if whole.codes else 0.0
        verdict = "the same model" if self.exact else "; ".join(self.reasons)
        return (
            f"{self.runtime}: {len(self.layers)} layers in integers, {len(self.float)} in float; largest error "
            f"{whole.error:.1e}, {share:.1e} of the codes one step off; {verdict}"
        )


def _codes(x: Tensor, grid: Grid) -> Tensor:
    return (x.double() / grid.scale).round().add_(grid.zero_point).clamp_(0, grid.top)


@torch.no_grad()
def exact_output(run: LayerRun) -> Tensor:
    """The output of a layer in float64, its activation and summand included; not put on a grid."""
    layer = run.plan.layer
    x, weight = run.codes.double() - layer.grid.zero_point, layer.weight.double()
    axes = (-1, 1, 1) if layer.convolution else (-1,)
    if layer.convolution:
        y = F.conv2d(layer.padded(x), weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        y = F.linear(x, weight)
    y = y * (layer.scale.double() * layer.grid.scale).view(axes)
    if layer.bias is not None:
        y = y + layer.bias.double().view(axes)
    if run.summand is not None:
        y = y + run.summand.double()
    return y if run.plan.activation is None else run.plan.activation(y)


def check_layer(run: LayerRun) -> LayerCheck:
    """Compare one run of a layer with its exact result."""
    want, found = exact_output(run), LayerCheck()
    if run.source is not None:
        found |= _check_codes(run.codes, _codes(run.source, run.plan.layer.grid))
    if run.plan.output is not None:
        return found | _check_codes(run.output, _codes(want, run.plan.output))
    largest = float(want.abs().max()) or 1.0
    error = (run.output.double() - want).abs_() / largest
    error.nan_to_num_(nan=float("inf"))
    return found | LayerCheck(error=float(error.max()), wrong=int((error > LARGEST_ERROR).sum()))


def _check_codes(codes: Tensor, want: Tensor) -> LayerCheck:
    off = (codes.double() - want).abs().nan_to_num_(nan=float("inf"))  # an input that was NaN has no code
    return LayerCheck(flips=int((off == 1).sum()), wrong=int((off > 1).sum()), codes=codes.numel())


def check_layers(runs: Iterable[LayerRun], model: nn.Module) -> dict[str, LayerCheck]:
    """{layer: its check}, layers that run several times together.

    Args:
        runs: What a runtime observed. Plans need not hold the codes of the weights.
        model: The quantized network that the runtime's module was made from.
    """
    layers, _ = integer_layers(model)
    found: dict[str, LayerCheck] = {}
    for run in runs:
        name, plan = run.plan.layer.name, run.plan
        layer = layers[name]
        if plan.norm:
            layer = layer.times(*affine(model.get_submodule(plan.norm)))
        check = check_layer(replace(run, plan=replace(plan, layer=layer)))
        found[name] = found.get(name, LayerCheck()) | check
    return found


def certificate(
    layers: RuntimeLayers,
    checks: Mapping[str, LayerCheck],
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
) -> Certificate:
    """The verdict on what was measured.

    Args:
        layers: What the runtime does with each layer.
        checks: {layer: check} of all that compute in integers.
        metrics: {"reference" | "runtime": figures of the task}.
    """
    reasons = []
    for name, check in checks.items():
        if check.wrong:
            reasons.append(f"layer {name!r} computes {check.wrong} values wrongly (largest error {check.error:.1e})")
        elif check.codes and check.flips > max(1, LARGEST_FLIPS * check.codes):
            reasons.append(f"layer {name!r}: {check.flips / check.codes:.1e} of its codes are one step off")
    if unseen := [name for name in layers.integer if name not in checks]:
        reasons.append(f"layer {unseen[0]!r} was not seen to run")
    if metrics:
        reasons += _metrics_apart(metrics["reference"], metrics["runtime"])
    return Certificate(layers.runtime, dict(checks), dict(layers.float), dict(metrics or {}), tuple(reasons))


def _metrics_apart(reference: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """One sentence for each metric that differs by too much.

    Accuracies, in percent, may differ by one item in a thousand, but by one item at least. Where a task has none, each
    of its numbers may differ by a thousandth of itself.
    """
    item = 100 * max(LARGEST_ITEMS, 1 / reference["samples"])
    shares = {name: item for name in reference if name.rpartition("/")[2] in ("top1", "accuracy", "agreement")}
    numbers = {k: v for k, v in reference.items() if isinstance(v, (int, float)) and k != "samples"}
    allowed = shares or {name: LARGEST_ITEMS * abs(value) for name, value in numbers.items()}
    return [
        f"{name} is {other[name]:.4g} on the runtime and {reference[name]:.4g} by the reference"
        for name, most in allowed.items()
        if abs(reference[name] - other[name]) > most * (1 + 1e-9)
    ]
