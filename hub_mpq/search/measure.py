"""Measure policies: the divergence of their outputs from those of the float model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.restore_state import copied
from ..core import FLOAT_BITS, Candidates, LayerBits, LayerGraph, Policy
from ..errors import InvalidArgument
from ..nn.blocks import cache_off
from ..nn.calibrate import calibrate_input, calibrate_weight, sample_inputs
from ..nn.quantize import check_finite, quantize_with_lsq
from ..nn.rounded_weights import RoundedWeights
from ..tasks import TaskLike, task_of, to_device
from ..tasks.batch import evaluating
from ..train.norms import reestimate_batch_norm
from ..train.random_draws import fixed_draws
from .kept_outputs import KeptOutputs


class PolicyMeter:
    """Measure any policy on one copy of a model, whose quantizers hold all candidate bit-widths.

    At a policy, the copy computes the same as the model that `HubMPQ.apply_policy` creates: scales are calibrated, and
    BatchNorm statistics are re-estimated for each policy. There is no communication with other processes, so the main
    process can measure alone. A model that draws random numbers in its forward draws the same ones at each policy.

    Args:
        model: The float model, which is not changed.
        graph: Its layers.
        candidates: `{searched layer: candidate bit-widths}`.
        calibration: Batches. Scales of activations are calibrated on the first `scale_batches` of them, and BatchNorm
            statistics are re-estimated on the first `norm_batches`.
        task: Task of the model, which tells what is compared; None to infer it from the model and the first batch.
        example: One input as the network takes it, which tells how many inputs a batch has.
        per_channel: Whether weights have one scale per output channel, else one per tensor.
        scale_batches: Number of batches for calibrating scales, as in `HubMPQ.apply_policy`.
        norm_batches: Number of batches for re-estimating norms, as in `HubMPQ.apply_policy`.
        rounded: Weights that have been rounded at all candidates; None to round to nearest.

    Attributes:
        forwards: Number of forward passes of a batch so far, of the float and the quantized model.

    Raises:
        InvalidArgument: There is no calibration batch, no layer that can be quantized, or the weight of a layer has NaN
            or infinite values.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: LayerGraph,
        candidates: Mapping[str, Candidates],
        calibration: Iterable[Any],
        *,
        task: TaskLike = None,
        example: Any = None,
        per_channel: bool = True,
        scale_batches: int = 4,
        norm_batches: int = 16,
        rounded: RoundedWeights | None = None,
    ) -> None:
        graph.check_layers(searched=False)
        check_finite(model, graph.names)
        self.float_model, self.graph, self.example, self.forwards = model, graph, example, 0
        self.device = next(model.parameters()).device
        self.calibration = list(islice(calibration, max(scale_batches, norm_batches)))
        if not self.calibration:
            raise InvalidArgument("the calibration data are empty")
        self.norm_batches = norm_batches
        self.task = task_of(task, model, self.calibration[0], example)
        # rounded weights overwrite those of the copy; quantizers do not change weights
        own = {id(model.get_submodule(name).weight) for name in graph.names} if rounded is not None else set()
        self.model = copied(model, (p for p in model.parameters() if id(p) not in own)).eval()
        widths = {
            layer.name: (
                _below_float(candidates[layer.name].weight if layer.fixed is None else (layer.fixed.weight,)),
                _below_float(candidates[layer.name].activation if layer.fixed is None else (layer.fixed.activation,)),
            )
            for layer in graph
        }
        if rounded is None and (several := [name for name, c in candidates.items() if len(c.grids) > 1]):
            raise InvalidArgument(f"layer {several[0]!r} has several group sizes; round its weight first")
        self.rounded, self._taken = rounded, dict[str, LayerBits]()
        groups = {x.name: candidates[x.name].weights[-1] if x.fixed is None else x.fixed for x in graph}
        self.layers: dict[str, Any] = quantize_with_lsq(
            self.model, graph, widths, per_channel=per_channel, groups=groups if rounded is None else None
        )
        taken = [to_device(batch, self.device) for batch in self.calibration[:scale_batches]]
        with fixed_draws(self.device, 0):
            self.samples = sample_inputs(self.model, taken, self.task.forward)
        self.forwards += len(taken) if self.samples else 0
        self.norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._float_statistics = self._statistics()
        self._estimated: dict[tuple[Any, ...], list[Any]] = {}
        self._calibrated: set[tuple[int, int]] = set()
        self._references = KeptOutputs()

    @torch.no_grad()
    def measure(self, policy: Policy, batches: Iterable[Any]) -> Tensor:
        """Measure the divergence of every item that counts, as defined by `Task.divergence`.

        Args:
            policy: Bit-widths of every layer, which must be candidates for searched layers.
            batches: Held-out batches; labels are ignored. The float model's outputs on them are kept on disk.

        Returns:
            One divergence for each item, float64 on the CPU.

        Raises:
            PolicyMismatch: The policy is for other layers.
            InvalidArgument: A bit-width is not a candidate, or not that of a fixed layer.
        """
        rows = [values[mask] for values, mask in self._divergences(policy, batches)]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def measure_samples(self, policy: Policy, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Measure the divergences of each sample, summed over its items.

        This is for batches with too many items to keep, such as pixels, and for standard errors, since the items of a
        sample are not independent. Arguments and errors are those of `measure`.

        Returns:
            (sum over the items of each sample, number of items that count), float64 on the CPU.
        """
        sums, counts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
        for values, mask in self._divergences(policy, batches):
            kept = torch.where(mask, values, torch.zeros_like(values)).reshape(len(values), -1)
            sums.append(kept.sum(1))
            counts.append(mask.reshape(len(mask), -1).sum(1).double())
        return torch.cat(sums), torch.cat(counts)

    def items(self, batch: Any) -> tuple[int, int, bool]:
        """Run the float model on a batch; return its samples, its items that count, and whether they are tokens."""
        with torch.no_grad(), evaluating(self.float_model):
            moved = to_device(batch, self.device)
            output = self._reference(batch, moved)
            _, mask = self.task.divergence(output, output, self.task.mask(moved))
        return len(mask), int(mask.sum()), mask.dim() == 2

    def _divergences(self, policy: Policy, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the divergence of every item, and the mask of those that count, of each batch, on the CPU."""
        self._set(policy)
        with evaluating(self.float_model):
            for own in batches:
                batch = to_device(own, self.device)
                output = self._run(self.model, batch)
                values, mask = self.task.divergence(output, self._reference(own, batch), self.task.mask(batch))
                del output  # before the next batch runs
                yield values.double().cpu(), mask.cpu()

    def _reference(self, own: Any, batch: Any) -> Any:
        """The float model's output on a batch, which is `batch` on the model's device."""
        output = self._references.get(own)
        if output is None:
            output = self._run(self.float_model, batch)
            self._references.add(own, output)
        return output

    def _run(self, model: nn.Module, batch: Any) -> Any:
        """A model's output, without the keys and values that it would keep for generation."""
        with fixed_draws(self.device, 0), cache_off(model):
            output = self.task.forward(model, batch)
        self.forwards += 1
        return output

    def _set(self, policy: Policy) -> None:
        """Set the copy to a policy."""
        policy.check(self.graph)
        for name, module in self.layers.items():
            bits, fixed = policy.bits[name], self.graph[name].fixed
            if fixed is not None and bits != fixed:
                raise InvalidArgument(f"layer {name!r} is fixed at {fixed}, got {bits} in the policy")
            sides = [(module.weight_quantizer, bits.weight, "weight")]
            if module.input_quantizer is not None:
                sides.append((module.input_quantizer, bits.activation, "input"))
            for quantizer, width, side in sides:
                if width != FLOAT_BITS and width not in quantizer.widths:
                    raise InvalidArgument(
                        f"layer {name!r}: {side} bits must be one of {_listed(quantizer.widths)}, got {width}"
                    )
                if self.rounded is not None and side == "weight":
                    self._take(name, module, bits, self.rounded)
                    continue
                self._calibrate(name, module, quantizer, width, side)
                quantizer.set_width(None if width == FLOAT_BITS else width)
            if module.input_quantizer is None and bits.activation != FLOAT_BITS:
                raise InvalidArgument(f"layer {name!r}: its input must stay float, got {bits} in the policy")
        if shared := self._conflict(policy):
            raise InvalidArgument(f"layers {shared[0]!r} and {shared[1]!r} share a weight and need equal weight bits")
        self._restore(self._float_statistics)
        key = tuple(policy.bits[name] for name in self.graph.names)
        if key not in self._estimated:
            with fixed_draws(self.device, 0):
                self.forwards += reestimate_batch_norm(
                    self.model,
                    self.calibration,
                    limit=self.norm_batches,
                    alone=True,
                    task=self.task,
                    example=self.example,
                )
            self._estimated[key] = self._statistics()
        self._restore(self._estimated[key])

    def _calibrate(self, name: str, module: Any, quantizer: Any, bits: int, side: str) -> None:
        """Set the scales of a bit-width when it is first used."""
        if bits == FLOAT_BITS or (id(quantizer), bits) in self._calibrated:
            return
        self._calibrated.add((id(quantizer), bits))
        if side == "weight":
            calibrate_weight(module, bits, mse=True)
        elif name in self.samples:
            calibrate_input(module, self.samples[name], bits, mse=True)

    def _take(self, name: str, module: Any, bits: LayerBits, rounded: RoundedWeights) -> None:
        """Set the rounded weight of a layer, unless it is set already."""
        module.weight_quantizer.set_width(None)
        if self.graph[name].weight_owner is None and self._taken.get(name) != bits.of_weight:
            module.weight.copy_(rounded.packed(name, bits).dequantize())
            self._taken[name] = bits.of_weight

    def _conflict(self, policy: Policy) -> tuple[str, str] | None:
        """Return two layers that share a weight and have different bit-widths for it, if any."""
        for layer in self.graph:
            owner = layer.weight_owner or layer.name
            if owner in policy.bits and policy.bits[layer.name].of_weight != policy.bits[owner].of_weight:
                return layer.name, owner
        return None

    def _statistics(self) -> list[Any]:
        return [None if m.running_mean is None else (m.running_mean.clone(), m.running_var.clone()) for m in self.norms]

    def _restore(self, statistics: Sequence[Any]) -> None:
        for norm, found in zip(self.norms, statistics, strict=True):
            if found is not None:
                norm.running_mean.copy_(found[0])
                norm.running_var.copy_(found[1])


def _below_float(widths: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(bits for bits in widths if bits != FLOAT_BITS))


def _listed(widths: Iterable[int]) -> str:
    return ", ".join(map(str, widths))
