"""LIMPQ: every layer's importance from one joint training of its quantizers' scales (Tang et al., ECCV 2022)."""

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
    # the LIMPQ authors', for ImageNet-sized runs
    "authors": {
        "optimizer": "sgd",
        "lr": 1e-2,
        "scale_lr": 1e-2,
        "weight_decay": 2.5e-5,
        "log": False,
        "indicator": "raw scale",
    },
}
# {indicator: the unit of its values}; a divergence's is known once it is measured
INDICATORS = {"divergence": "", "scale": "relative_power", "raw scale": "scale"}


@register_strategy("limpq")
class LIMPQ(SearchStrategy):
    """Atomic operation of the paper (§3.3): a pass at each uniform width, one pass at random widths, one step.

    preset: "short" or "authors" (`PRESETS`). scale_lr: learning rate of log s (Adam) [ours: the authors' SGD hardly
    moves a scale in a short run], None: the preset's. freeze_weights: only scales and norms learn.
    uniform: False leaves the uniform passes out, for ablations.
    indicator: what is read out at the end. "divergence" (our construction): the estimated divergence of the output, by
    `sensitivity`, when one operand is quantized with its trained scale s_b. It has one unit for all layers, weights and
    activations, so it needs no α. "scale" (our construction): the paper's indicator without its unit, the relative
    power (s_b/rms)², by `relative_power`; it falls with the width and needs no α either. Both have weight scales per
    output channel, from the start of `weight_grid`. "raw scale": s_b itself, one a tensor, from the authors'
    start, α balancing the sums (the paper). A scale has the unit of its tensor, and a norm behind a layer makes that
    unit arbitrary: 0.1 means little in one layer and much in the next. It is smaller at 1 bit than at 2, so it
    cannot rank 1 bit.
    granularity: of the weight scales, "tensor" or "channel", where the indicator's own is not wanted (an ablation).
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
            raise InvalidArgument(f"preset is one of {', '.join(sorted(PRESETS))}, not {preset!r}")
        self.preset, chosen = preset, PRESETS[preset]
        self.indicator = chosen["indicator"] if indicator is None else indicator
        if self.indicator not in INDICATORS:
            raise InvalidArgument(f"indicator is {' or '.join(INDICATORS)}, not {indicator!r}")
        if granularity not in ("tensor", "channel", None):
            raise InvalidArgument(f"granularity is tensor or channel, not {granularity!r}")
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
        """Put multi-width quantizers into the searched layers of `model` and banks into its norms, in place.

        norms: {norm name: layer whose output it reads}. Fixed layers stay float while indicators train.
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
        """Starts, from this process's first batch."""
        least_error = self.indicator != "raw scale"
        calibrate_weights(model, mse=least_error)
        calibrate_inputs(model, dict(inputs), mse=least_error)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        groups = self.loss.parameter_groups(model)
        groups[-1]["lr"] = self.scale_lr
        return groups

    def set_widths(self, model: nn.Module, widths: Mapping[str, int]) -> None:
        """Select each layer's width (weights and activations share it), and its norm's bank."""
        model = getattr(model, "module", model)
        for name, module in self.layers.items():
            for quantizer in (module.weight_quantizer, module.input_quantizer):
                if isinstance(quantizer, LSQ):
                    quantizer.set_width(quantizer.nearest(widths[name]))
        for norm, layer in self.norms.items():
            # a norm behind a layer that is not searched follows the pass's first layer
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
        """The scales' trajectories: of each layer, side and width, over its start."""
        out: dict[str, float] = {}
        for name, module in self.layers.items():
            for side, q in (("weight", module.weight_quantizer), ("activation", module.input_quantizer)):
                if isinstance(q, LSQ):
                    moved = torch.where(q.base != NO_START, q.scales.detach() / q.base, 1.0).mean(1).tolist()
                    out |= {f"scale/{side}/{name}/{bits}": x for bits, x in zip(q.widths, moved, strict=True)}
        return out

    def read_out(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """What the trained scales mean: relative powers, or divergences; nothing to do for "raw scale"."""
        if self.indicator == "raw scale":
            return
        model.eval()
        self.set_widths(model, dict.fromkeys(self.layers, self.widths[-1]))  # the banks nearest to float
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
        """{layer: {bits: scale}} of one operand's quantizers: trained, or as they started."""
        out = {}
        for name, module in self.layers.items():
            quantizer = getattr(module, which)
            if isinstance(quantizer, LSQ):
                # per channel: the root mean square, so that one number stands for the layer
                scales = (quantizer.base if start else quantizer.scales).detach().double()
                table = scales.square().mean(1).sqrt().tolist()
                out[name] = dict(zip(quantizer.widths, table, strict=True))
        return out

    def indicators(self, model: nn.Module) -> Indicators:
        """The indicators of weights and inputs."""
        weight, activation = self._scales("weight_quantizer"), self._scales("input_quantizer")
        signed = {name: bool(self.layers[name].input_quantizer.zero_points.any()) for name in activation}
        if self.indicator == "divergence":
            weight, activation = self.found.weight, self.found.activation
        elif self.indicator == "scale":
            weight, activation = self.powers
        return Indicators(weight, activation, signed)

    def details(self, model: nn.Module) -> dict[str, Any]:
        """The settings, and how far the scales moved."""
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
