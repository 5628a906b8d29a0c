"""Check that a runtime computes the same model: each layer against its exact result, and the metric of the task.

Comparing the outputs of whole networks is not meaningful, because one value that is rounded to the other side of a tie
changes everything after it. Instead, each layer's output on the runtime is compared with the exact result, integers
summed in float64, for the input that the layer received there.
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
"""Maximum error of a float32 output, relative to the largest output of the layer."""
LARGEST_FLIPS = 1e-3
"""Maximum share of codes that differ by one step: those that lie on a tie within float32 rounding."""
LARGEST_ITEMS = 1e-3
"""Maximum change of a metric, as a share of the items: one in a thousand."""


@dataclass(frozen=True, eq=False)
class LayerRun:
    """Input and output of a layer in one run.

    Args:
        plan: The layer and what is fused into it.
        codes: Codes of the input, as the runtime made them.
        output: Output in float32, or as codes if `plan.output` is set.
        summand: The residual that was added, float32.
        source: The float32 input that the codes were made from, if they were made for this layer.
    """

    plan: FusedLayer
    codes: Tensor
    output: Tensor
    summand: Tensor | None = None
    source: Tensor | None = None


@dataclass(frozen=True)
class LayerCheck:
    """Deviation of a layer from its exact result.

    Args:
        error: Largest difference of a float32 output, relative to the largest output; 0 for codes.
        flips: Number of codes (of the layer's output, or of its input) that differ by one step.
        wrong: Number of codes that differ by more than one step, or of outputs that differ by more than
            `LARGEST_ERROR`: saturation, or a bug.
        codes: Number of codes that were compared.
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
    """Whether a runtime computes the same model as the reference, and how far each layer deviates.

    Each layer is compared with its exact result. The bounds: a float32 output may deviate by 1e-5 of the layer's
    largest output, one code in a thousand (at least one) may differ by one step, and an accuracy may differ by one item
    in a thousand (at least one). If a task has no accuracy, each of its metrics may differ by a thousandth.

    Args:
        runtime: Name of the runtime.
        layers: `{layer that computes in integers: its check}`. A check has `error` (largest float32 difference,
            relative to the largest output), `flips` (codes that differ by one step), `wrong` (values out of bounds) and
            `codes` (codes compared).
        float: `{layer that computes in float: reason}`.
        metrics: `{"reference" | "runtime": metrics of the task}`; empty if they were not measured.
        reasons: Why it is not the same model, one string each; empty if it is.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> images = torch.zeros(2, 3, 32, 32)
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> mpq = mpq.apply_policy("W4A4", [images])
        >>> certificate = mpq.certify(mpq.to_runtime("torch"), [images])
        >>> certificate.exact, certificate.reasons, len(certificate.float)
        (True, (), 16)
    """

    runtime: str
    layers: Mapping[str, LayerCheck]
    float: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether it is the same model within the bounds of the class."""
        return not self.reasons

    @property
    def total(self) -> LayerCheck:
        """The checks of all layers combined."""
        whole = LayerCheck()
        for check in self.layers.values():
            whole |= check
        return whole

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values.

        Returns:
            All fields, and `exact`.
        """
        return {"exact": self.exact, **asdict(self), "reasons": list(self.reasons)}

    def summary(self) -> dict[str, Any]:
        """Summarize for a model card, as JSON values.

        Returns:
            The verdict, the machine, the number of layers in integers and in float, the deviation of all layers
            together, and the metrics.
        """
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
            f"{self.runtime}: {verdict}; {len(self.layers)} layers in integers, {len(self.float)} in float; largest "
            f"relative error {whole.error:.1e}, {100 * share:.2g} % of the integer codes differ by one step"
        )


def _codes(x: Tensor, grid: Grid) -> Tensor:
    return (x.double() / grid.scale).round().add_(grid.zero_point).clamp_(0, grid.top)


@torch.no_grad()
def exact_output(run: LayerRun) -> Tensor:
    """Compute the output of a layer in float64, with its activation and residual, not rounded to a grid."""
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
    off = (codes.double() - want).abs().nan_to_num_(nan=float("inf"))  # a NaN input has no code
    return LayerCheck(flips=int((off == 1).sum()), wrong=int((off > 1).sum()), codes=codes.numel())


def check_layers(runs: Iterable[LayerRun], model: nn.Module) -> dict[str, LayerCheck]:
    """Check all runs of each layer.

    Args:
        runs: What a runtime observed. Plans need not contain the codes of the weights.
        model: The quantized network that the runtime's module was made from.

    Returns:
        {layer: its check}, all runs of a layer combined.
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
    """Turn measurements into a verdict.

    Args:
        layers: Which layers the runtime computes in integers, and why not the others.
        checks: {layer: check} of all layers that compute in integers.
        metrics: {"reference" | "runtime": metrics of the task}.

    Returns:
        The certificate.
    """
    reasons = []
    for name, check in checks.items():
        if check.wrong:
            reasons.append(f"layer {name!r} has {check.wrong} wrong values (largest error {check.error:.1e})")
        elif check.codes and check.flips > max(1, LARGEST_FLIPS * check.codes):
            reasons.append(f"layer {name!r} has {check.flips / check.codes:.1e} of its codes off by one step")
    if unseen := [name for name in layers.integer if name not in checks]:
        reasons.append(f"layer {unseen[0]!r} did not run")
    if metrics:
        reasons += _metrics_apart(metrics["reference"], metrics["runtime"])
    return Certificate(layers.runtime, dict(checks), dict(layers.float), dict(metrics or {}), tuple(reasons))


def _metrics_apart(reference: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """A reason for each metric that differs by too much.

    Accuracies, in percent, may differ by one item in a thousand, but at least by one item. If a task has no accuracy,
    each of its numbers may differ by a thousandth of its value.
    """
    item = 100 * max(LARGEST_ITEMS, 1 / reference["samples"])
    shares = {name: item for name in reference if name.rpartition("/")[2] in ("top1", "accuracy", "agreement")}
    numbers = {k: v for k, v in reference.items() if isinstance(v, (int, float)) and k != "samples"}
    allowed = shares or {name: LARGEST_ITEMS * abs(value) for name, value in numbers.items()}
    return [
        f"{name} is {other[name]:.4g} on the runtime, but {reference[name]:.4g} on the reference"
        for name, most in allowed.items()
        if abs(reference[name] - other[name]) > most * (1 + 1e-9)
    ]
