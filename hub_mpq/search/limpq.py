"""LIMPQ: the importance of every layer, from one joint training of all quantizers' scales (Tang et al., ECCV 2022)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import FLOAT_BITS, Candidates, Indicators, LayerGraph
from ..core.checks import number
from ..errors import InvalidArgument
from ..nn.banks import add_banks, select_bank
from ..nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs, widths_off
from ..nn.quantize import quantize_with_lsq, quantized_layers
from ..quantizers import LSQ
from ..quantizers.lsq import NO_START
from ..train.hooks import Groups
from ..train.processes import share_samples
from .movement import movement
from .relative_power import relative_powers
from .sensitivity import Rows, Sensitivity, sensitivity
from .strategy import SearchStrategy, register_strategy

PRESETS: dict[str, dict[str, Any]] = {
    # our construction, for runs of tens to thousands of steps
    "short": {
        "optimizer": "adam",
        "lr": 1e-4,
        "scale_lr": 1e-2,
        "weight_decay": 0.0,
        "log": True,
        "indicator": "divergence",
    },
    # settings of LIMPQ's authors, for ImageNet-sized runs
    "authors": {
        "optimizer": "sgd",
        "lr": 1e-2,
        "scale_lr": 1e-2,
        "weight_decay": 2.5e-5,
        "log": False,
        "indicator": "raw scale",
    },
}
# {indicator: unit of its values}; that of a divergence is known once it is measured
INDICATORS = {"divergence": "", "scale": "relative_power", "raw scale": "scale"}


@register_strategy("limpq")
class LIMPQ(SearchStrategy):
    """Learned layer importance (LIMPQ), from one joint training at all bit-widths.

    Each optimizer step is the paper's atomic operation (§3.3): one pass at each uniform bit-width and one pass at
    random bit-widths.

    There are three indicators:

    - "divergence" (our construction) is the estimated divergence of the output, by `sensitivity`, when one operand is
      quantized with its trained scale s_b. Its unit is the same for all layers, weights and activations, so it needs no
      multiplier α.
    - "scale" (our construction) is the paper's indicator without its unit: the relative power (s_b/rms)², by
      `relative_powers`. It falls with the bit-width and needs no α either.
    - "raw scale" is s_b itself, as in the paper, with one scale per tensor, initialized as by the authors, and α to
      balance the sums. A scale has the unit of its tensor, and a norm after the layer makes that unit arbitrary: 0.1 is
      small in one layer and large in the next. It is smaller at 1 bit than at 2, so it cannot rank 1 bit.

    The first two have weight scales per output channel, initialized by `weight_grid`.

    Args:
        preset: "short" (our construction, for runs of tens to thousands of steps) or "authors" (the settings of LIMPQ's
            authors, for ImageNet-sized runs), see `PRESETS`.
        scale_lr: Learning rate of the scales, for "short" of log s with Adam (our construction, since the authors' SGD
            hardly moves a scale in a short run); None for that of the preset.
        freeze_weights: Whether only scales and norms are trained.
        uniform: False to omit the passes at uniform bit-widths, for ablations.
        indicator: "divergence", "scale" or "raw scale"; None for that of the preset.
        granularity: "tensor" or "channel" for weight scales, for ablations; None for that of the indicator.
    """

    batches = 16
    found: Sensitivity
    powers: tuple[Rows, Rows]
    weights_alone = True
    stage = "indicators"
    learned_once = True

    def __init__(
        self,
        *,
        preset: str = "short",
        scale_lr: float | None = None,
        freeze_weights: bool = False,
        uniform: bool = True,
        indicator: str | None = None,
        granularity: str | None = None,
    ) -> None:
        if preset not in PRESETS:
            raise InvalidArgument(f"preset must be one of {', '.join(sorted(PRESETS))}, got {preset!r}")
        self.preset, chosen = preset, PRESETS[preset]
        self.indicator = chosen["indicator"] if indicator is None else indicator
        if self.indicator not in INDICATORS:
            raise InvalidArgument(f"indicator must be one of {', '.join(INDICATORS)}, got {indicator!r}")
        if granularity not in ("tensor", "channel", None):
            raise InvalidArgument(f"granularity must be 'tensor' or 'channel', got {granularity!r}")
        self.per_channel = (granularity or ("tensor" if self.indicator == "raw scale" else "channel")) == "channel"
        self.unit = INDICATORS[self.indicator]
        self.optimizer, self.lr, self.log = chosen["optimizer"], chosen["lr"], chosen["log"]
        self.weight_decay = chosen["weight_decay"]
        self.scale_lr = chosen["scale_lr"] if scale_lr is None else number("scale_lr", scale_lr)
        self.freeze_weights, self.uniform = freeze_weights, uniform

    def attach(
        self,
        model: nn.Module,
        graph: LayerGraph,
        candidates: Mapping[str, Candidates],
        norms: Mapping[str, str],
    ) -> None:
        """Insert quantizers of all bit-widths into the searched layers and banks into the norms, in place.

        Fixed layers stay float while indicators are trained.
        """
        searched = {layer.name for layer in graph.searched}
        quantize_with_lsq(
            model,
            graph,
            {
                n: (c.weight, () if graph[n].weight_only or c.float_inputs else c.activation)
                for n, c in candidates.items()
                if n in searched
            },
            per_channel=self.per_channel,
            log=self.log,
            groups={n: c.weights[-1] for n, c in candidates.items()},
        )
        self.layers: dict[str, Any] = {n: m for n, m in quantized_layers(model) if n in searched}
        self.widths = sorted({b for c in candidates.values() for b in (*c.weight, *c.activation)} - {FLOAT_BITS})
        self.norms, self.graph, self.candidates = dict(norms), graph, candidates
        self.passes = len(self.widths) * self.uniform + 1
        add_banks(model, norms, len(self.widths))
        if self.freeze_weights:
            for module in self.layers.values():
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad_(False)

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        """Initialize the scales."""
        least_error = self.indicator != "raw scale"
        calibrate_weights(model, mse=least_error)
        calibrate_inputs(model, dict(inputs), mse=least_error)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        groups = self.loss.parameter_groups(model)
        groups[-1]["lr"] = self.scale_lr
        return groups

    def set_widths(self, model: nn.Module, widths: Mapping[str, int]) -> None:
        """Select the bit-width of each layer, for weights and activations, and the bank of its norm."""
        model = getattr(model, "module", model)
        for name, module in self.layers.items():
            for quantizer in (module.weight_quantizer, module.input_quantizer):
                if isinstance(quantizer, LSQ):
                    quantizer.set_width(quantizer.nearest(widths[name]))
        for norm, layer in self.norms.items():
            # a norm after a layer that is not searched follows the first layer of the pass
            width = widths.get(layer, next(iter(widths.values())))
            select_bank(model, norm, self.widths.index(width))

    def losses(self, model: nn.Module, batch: Any, rng: random.Random) -> Iterator[tuple[Tensor, Groups]]:
        for bits in self.widths if self.uniform else ():
            self.set_widths(model, dict.fromkeys(self.layers, bits))
            yield self.loss.loss(model, batch), None
        self.set_widths(model, {name: rng.choice(self.widths) for name in self.layers})
        yield self.loss.loss(model, batch), None

    def pass_names(self) -> list[str]:
        return [f"loss/{bits} bits" for bits in self.widths if self.uniform] + ["loss/random widths"]

    def watch(self, model: nn.Module) -> dict[str, float]:
        """Return the scale of each layer, operand and bit-width, relative to its initial value."""
        out: dict[str, float] = {}
        for name, module in self.layers.items():
            for side, q in (("weight", module.weight_quantizer), ("activation", module.input_quantizer)):
                if isinstance(q, LSQ):
                    moved = torch.where(q.base != NO_START, q.scales.detach() / q.base, 1.0).mean(1).tolist()
                    out |= {f"scale/{side}/{name}/{bits}": x for bits, x in zip(q.widths, moved, strict=True)}
        return out

    def read_out(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Compute relative powers or divergences from the trained scales; nothing to do for "raw scale"."""
        if self.indicator == "raw scale":
            return
        model.eval()
        self.set_widths(model, dict.fromkeys(self.layers, self.widths[-1]))  # the banks that are nearest to float
        if self.indicator == "scale":
            inputs = share_samples(sample_inputs(model, batches, self.loss.task.forward))
            with widths_off(model):
                self.powers = relative_powers(self.layers, inputs)
            return
        with widths_off(model):
            normed = set(self.norms.values())
            self.found = sensitivity(self.layers, model, batches, self.loss.task, normed, self.seed)
        self.unit = self.found.unit

    def _scales(self, which: str, *, start: bool = False) -> Rows:
        """Return `{layer: {bits: scale}}` of one operand, trained or initial."""
        out = {}
        for name, module in self.layers.items():
            quantizer = getattr(module, which)
            if isinstance(quantizer, LSQ):
                # the root mean square over channels, so that a layer has one number
                scales = (quantizer.base if start else quantizer.scales).detach().double()
                table = scales.square().mean(1).sqrt().tolist()
                out[name] = dict(zip(quantizer.widths, table, strict=True))
        return out

    def indicators(self, model: nn.Module) -> Indicators:
        """Return the indicators of weights and inputs."""
        weight, activation = self._scales("weight_quantizer"), self._scales("input_quantizer")
        signed = {name: bool(self.layers[name].input_quantizer.zero_points.any()) for name in activation}
        if self.indicator == "divergence":
            weight, activation = self.found.weight, self.found.activation
        elif self.indicator == "scale":
            weight, activation = self.powers
        return Indicators(weight, activation, signed)

    def details(self, model: nn.Module) -> dict[str, Any]:
        """Return the settings, and how far the scales have moved."""
        sides = {"weight": "weight_quantizer", "activation": "input_quantizer"}
        moved = {}
        for side, which in sides.items():
            start = {n: row for n, row in self._scales(which, start=True).items() if NO_START not in row.values()}
            end = self._scales(which)
            moved[side] = movement(start, {name: end[name] for name in start})
        estimated = {"standard_error": self.found.relative_error()} if self.indicator == "divergence" else {}
        return {
            **estimated,
            "indicator": self.indicator,
            "preset": self.preset,
            "optimizer": self.optimizer,
            "lr": self.loss.lr,
            "scale_lr": self.scale_lr,
            "freeze_weights": self.freeze_weights,
            "movement": moved,
        }
