"""Scores by the trace of the Hessian (HAWQ-V2, Dong et al., NeurIPS 2020), with Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import whole
from ..nn.layers import first_operand
from .posttraining import PostTraining, noise, read
from .sensitivity import counted
from .strategy import register_strategy


@register_strategy("hessian")
class Hessian(PostTraining):
    """Scores by the trace of the Hessian: ½·trace(H)/n · ‖T − Q(T)‖², where n is the number of elements.

    The mean trace is that of HAWQ-V2. For inputs, it is the trace for an additive disturbance, per sample, which is our
    construction.

    H is the Hessian of the task's mean divergence from the output itself (for classes, the Fisher matrix). A score is
    thus the mean divergence caused by an error of that size in a random direction. This is our construction, too:
    HAWQ-V2 uses the loss of the labels, whose unit is not that of the divergence.

    trace(H) is the mean of vᵀHv over `probes` draws of v in {−1, +1}, with one double backward each. Negative estimates
    count as 0. Rounding errors are not in random directions (those of large weights under large inputs matter most), so
    sums can be several times too small; `examples/benchmarks/prediction.py --strategy hessian` measures by how much.

    Args:
        batches: Number of batches, at least 1.
        probes: Draws of v for each batch, at least 1.
    """

    def __init__(self, *, batches: int = 1, probes: int = 8) -> None:
        super().__init__(batches=batches)
        self.probes = whole("probes", probes, 1)
        self.traces: dict[str, tuple[float, float]] = {}

    def measure(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        weight, activation = self._traces(model, batches)
        with torch.no_grad():
            for name, row, quantizer, module in self.quantizers():
                if row is self.weight:
                    x, trace = module.weight, weight[name] / module.weight.numel()
                    row[name] = {b: 0.5 * trace * float(e.square().sum()) for b, e in noise(quantizer, x).items()}
                else:
                    x, trace = read(inputs, name).to(module.weight.device)[None], activation[name]
                    row[name] = {b: 0.5 * trace * float(e.square().mean()) for b, e in noise(quantizer, x).items()}
        self.traces = {n: (weight[n], activation.get(n, 0.0)) for n in self.layers}

    def _traces(self, model: nn.Module, batches: Sequence[Any]) -> tuple[dict[str, float], dict[str, float]]:
        """Estimate the traces for the weights and for one sample's inputs; the loss is a mean over items."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        generator = torch.Generator().manual_seed(self.seed)
        moved: list[tuple[str, Tensor]] = []

        def disturb(_m: nn.Module, args: Any, kwargs: Any, name: str) -> tuple[tuple[Tensor], dict[str, Any]]:
            x = first_operand(args, kwargs)
            moved.append((name, torch.zeros_like(x, requires_grad=True)))  # one for each run of the layer
            return (x + moved[-1][1],), {}

        handles = [
            m.register_forward_pre_hook(
                lambda m, args, kwargs, name=n: disturb(m, args, kwargs, name), with_kwargs=True
            )
            for n, m in self.layers.items()
            if m.input_quantizer is not None
        ]
        names = list(self.layers)
        weight, activation = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        items = 0
        try:
            # fused attention does not support second derivatives
            with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                for batch in batches:
                    moved.clear()
                    loss, more = self.probe(model, batch)
                    items += more
                    leaves = [self.layers[n].weight for n in names] + [x for _, x in moved]
                    grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
                    for _ in range(self.probes):
                        found = self._products(grads, leaves, generator)
                        for n, value in zip(names, found, strict=False):
                            weight[n] += value
                        for (n, _), value in zip(moved, found[len(names) :], strict=True):
                            activation[n] += value
        finally:
            for handle in handles:
                handle.remove()
        total = self.probes * counted(items)
        return {n: max(v / total, 0.0) for n, v in weight.items()}, {
            n: max(v / total, 0.0) for n, v in activation.items()
        }

    def probe(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """Return the summed divergence of the output from itself, whose value and gradient are zero, and the items."""
        task = self.loss.task
        output = task.forward(model, batch)
        values, kept = task.divergence(output, output, task.mask(batch))
        return values[kept].sum(), int(kept.sum())

    @staticmethod
    def _products(grads: Sequence[Tensor | None], leaves: Sequence[Tensor], generator: torch.Generator) -> list[float]:
        """Compute vᵀHv of every leaf for one draw; cross terms average out, because v is independent across leaves."""
        v = [(torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x) for x in leaves]
        dot = torch.stack([(g * s).sum() for g, s in zip(grads, v, strict=True) if g is not None]).sum()
        if not dot.requires_grad:
            return [0.0] * len(leaves)
        second = torch.autograd.grad(dot, leaves, retain_graph=True, allow_unused=True)
        return [0.0 if h is None else float((h * s).sum()) for h, s in zip(second, v, strict=True)]
