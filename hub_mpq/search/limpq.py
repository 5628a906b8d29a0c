"""LIMPQ: every layer's importance from one joint training of its quantizers' scales (Tang et al., ECCV 2022)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..nn.banks import add_banks, select_bank
from ..nn.calibrate import calibrate_inputs, calibrate_weights
from ..nn.swap import quantized_layers, swap
from ..quantizers import LSQ
from ..spec import Candidates, Indicators, LayerGraph
from ..train.finetune import Finetune
from ..train.hooks import Groups
from .movement import movement
from .scores import Scores, balance, limpq_scores
from .strategy import SearchStrategy, register_strategy


@register_strategy("limpq")
class LIMPQ(SearchStrategy):
    """Atomic operation of the paper (§3.3): a pass at each uniform width, one pass at random widths, one step.

    loss: how one pass is scored (labels or distillation). scale_lr: learning rate of log s (Adam) [ours: the
    authors' SGD hardly moves a scale in a short run]. freeze_weights: only scales and norms learn.
    uniform: False leaves the uniform passes out, for ablations.
    """

    def __init__(
        self,
        loss: Finetune | None = None,
        *,
        scale_lr: float = 1e-2,
        freeze_weights: bool = False,
        uniform: bool = True,
        log: bool = True,
    ) -> None:
        if loss is not None:
            self.loss = loss
        self.scale_lr, self.freeze_weights = scale_lr, freeze_weights
        self.uniform, self.log = uniform, log

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
        swap(
            model,
            graph,
            {
                n: (c.weight, () if graph[n].weight_only else c.activation)
                for n, c in candidates.items()
                if n in searched
            },
            per_channel=False,
            log=self.log,
        )
        self.layers: dict[str, nn.Module] = {n: m for n, m in quantized_layers(model) if n in searched}
        self.widths = sorted({b for c in candidates.values() for b in (*c.weight, *c.activation)})
        self.norms, self.graph, self.candidates = dict(norms), graph, candidates
        self.passes = len(self.widths) * self.uniform + 1
        add_banks(model, norms, len(self.widths))
        if self.freeze_weights:
            for module in self.layers.values():
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad_(False)

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        """The starts of the authors, from this process's first batch."""
        calibrate_weights(model, mse=False)
        calibrate_inputs(model, dict(inputs), mse=False)

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

    def scores(self, model: nn.Module) -> Scores:
        """Indicators with the balancing α; `HubMPQ.search` takes another α from stored indicators."""
        found = self.indicators({})
        return limpq_scores(found, self.graph, self.candidates, balance(found))

    def indicators(self, provenance: Mapping[str, Any]) -> Indicators:
        """Read the scales out: the indicator of (layer, b) is s_b."""

        def rows(which: str, start: bool) -> dict[str, dict[int, float]]:
            out = {}
            for name, module in self.layers.items():
                quantizer = getattr(module, which)
                if isinstance(quantizer, LSQ):
                    table = (quantizer.base if start else quantizer.scales).detach()[:, 0].tolist()
                    out[name] = dict(zip(quantizer.widths, table, strict=True))
            return out

        weight, activation = rows("weight_quantizer", False), rows("input_quantizer", False)
        signed = {
            name: bool(module.input_quantizer.zero_points.any())
            for name, module in self.layers.items()
            if name in activation
        }
        moved = {
            "weight": movement(rows("weight_quantizer", True), weight),
            "activation": movement(rows("input_quantizer", True), activation),
        }
        return Indicators(weight, activation, signed, {"strategy": "limpq", **provenance, "movement": moved})
