"""Round the weights of a float model at every candidate of a search, before scores are measured."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..core import FLOAT_BITS, Candidates, LayerBits, LayerGraph, LayerSpec, Policy
from ..core.layer_kind import layer_kinds
from ..errors import InvalidArgument
from ..nn.input_moments import input_moments
from ..nn.quantize import check_finite
from ..nn.rounded_weights import RoundedWeights
from ..nn.split_experts import stack_and_expert
from ..pack import PackedTensor, pack_weight
from ..quantizers.base import channel_rows
from ..quantizers.gptq import Factor
from ..quantizers.weight_grid import WeightGrid, weight_grid
from ..tasks import TaskLike, task_of, to_device

logger = logging.getLogger(__name__)
ROUNDINGS = ("gptq", "nearest")
BATCHES = 16
"""Maximum number of batches that are read, with up to 4,096 positions of each input."""


def check_rounding(rounding: str | None) -> None:
    """Raise InvalidArgument unless `rounding` is None or one of `ROUNDINGS`."""
    if rounding is not None and rounding not in ROUNDINGS:
        raise InvalidArgument(f"rounding must be {' or '.join(map(repr, ROUNDINGS))}, got {rounding!r}")


def chosen_rounding(rounding: str | None, policy: Policy, batches: Any, per_channel: bool) -> str | None:
    """Choose how the weights of a policy are rounded without training.

    Args:
        rounding: The requested rounding; None for the default: GPTQ if the policy quantizes weights alone and there are
            batches, else None.
        policy: The policy.
        batches: Calibration data, or None.
        per_channel: Whether weights have more than one scale per tensor.

    Returns:
        "gptq", "nearest" or None.
    """
    if rounding is None and batches is not None and per_channel and policy.weights_alone:
        return "gptq"
    return rounding


def weight_choices(graph: LayerGraph, candidates: Mapping[str, Candidates]) -> dict[str, tuple[LayerBits, ...]]:
    """Collect the candidates of every weight.

    Returns:
        `{layer that owns its weight: candidates}`: for a fixed layer its bit-width alone; float layers are omitted.
    """
    out: dict[str, set[LayerBits]] = {}
    for layer in graph:
        found = candidates[layer.name].weights if layer.fixed is None else (layer.fixed.of_weight,)
        wanted = {bits for bits in found if bits.weight != FLOAT_BITS}
        out.setdefault(layer.weight_owner or layer.name, set()).update(wanted)
    return {name: tuple(sorted(choices)) for name, choices in out.items() if choices}


@torch.no_grad()
def round_weights(
    model: nn.Module,
    graph: LayerGraph,
    choices: Mapping[str, Sequence[LayerBits]],
    batches: Iterable[Any],
    *,
    rounding: str = "gptq",
    task: TaskLike = None,
    example: Any = None,
    folder: Path | None = None,
    resume: bool = False,
) -> RoundedWeights:
    """Round the weights of a float model, which is not changed.

    Scales and zero points minimize the output error on the batches, see `weight_grid`. "gptq" rounds the columns of
    linear layers one after another, so that later columns compensate the error of earlier ones (Frantar et al., ICLR
    2023), and uses one factorization for all candidates of a layer. With "nearest", and for layers that are not matrix
    products, weights are rounded to nearest.

    In addition to the model and the hidden states of the batches, this needs the memory of one block of layers,
    whatever the depth.

    Args:
        model: The float model.
        graph: Its layers.
        choices: `{layer that owns its weight: its candidates}`.
        batches: Calibration data; up to 16 batches are read, without their labels.
        rounding: "gptq" or "nearest".
        task: Task of the model; None to infer it.
        example: One input as the network takes it.
        folder: Folder for the rounded weights; None for a temporary one.
        resume: Reuse what an interrupted run left in `folder`.

    Returns:
        The weights at all candidates.

    Raises:
        InvalidArgument: There is no batch, or a weight or an input is not finite.
        HubMPQError: The folder cannot be written.
    """
    from huggingface_hub.utils import tqdm

    check_rounding(rounding)
    check_finite(model, graph.names)
    device = next(model.parameters()).device
    taken = [to_device(batch, device) for batch in islice(batches, BATCHES)]
    if not taken:
        raise InvalidArgument("the calibration data are empty")
    known = task_of(task, model, example=example)
    # the whole model, because the inputs of a layer depend on all layers before it
    settings = "" if folder is None else f"2 {rounding} {digest_of(taken, model.state_dict())}"
    rounded = RoundedWeights(folder, settings, nearest=rounding == "nearest")
    layers = [layer for layer in graph if layer.name in choices]
    left = _left(model, layers, {x.name for x in layers if not (resume and rounded.has(x, choices[x.name]))})
    with tqdm(total=len(layers), initial=len(layers) - len(left), desc="weights", unit="layer", leave=False) as bar:

        def store(
            layer: LayerSpec, moments: Tensor | None = None, factors: Iterable[Factor] | None = None, unreached: int = 0
        ) -> None:
            weight = model.get_submodule(layer.name).weight.detach()
            found = round_weight(weight, layer, choices[layer.name], moments, factors)
            rounded.add(layer, found, unreached)
            bar.update()

        there = {layer.name: layer for layer in left}
        # the mask of a task tells which positions count
        for part in input_moments(model, left, taken, known.forward, diagonal=rounding != "gptq", mask=known.mask):
            factor: tuple[int, Factor] | None = None
            for layer in part.layers:
                moments, unreached = part.moments.get(layer.name), part.unreached.get(layer.name, 0)
                if moments is None or rounding != "gptq":
                    store(layer, moments, None, unreached)
                elif moments.dim() == 3:  # experts, one after another
                    store(layer, moments.diagonal(dim1=1, dim2=2), map(Factor, moments), unreached)
                else:
                    if factor is None or factor[0] != id(moments):  # layers with the same input follow each other
                        factor = (id(moments), Factor(moments))
                    store(layer, moments.diagonal(), (factor[1],))
                del there[layer.name]
        for layer in there.values():  # convolutions and tables
            store(layer)
    if rounded.unreached:
        logger.warning(
            "the batches have no tokens for %d expert matrices (of %s); they are rounded using the inputs of the other "
            "experts of their stack",
            sum(rounded.unreached.values()),
            ", ".join([*rounded.unreached][:3]) + (", …" if len(rounded.unreached) > 3 else ""),
        )
    return rounded


def _left(model: nn.Module, layers: Sequence[LayerSpec], missing: set[str]) -> list[LayerSpec]:
    """Return the layers to round: the missing ones, and the other experts of their stacks, whose inputs are used to
    round an expert without tokens."""
    stacks = {x.name: part[0] for x in layers if (part := stack_and_expert(model, x.name))}
    again = {stacks[name] for name in missing if name in stacks}
    return [x for x in layers if x.name in missing or stacks.get(x.name) in again]


def round_weight(
    weight: Tensor,
    layer: LayerSpec,
    choices: Sequence[LayerBits],
    importance: Tensor | None = None,
    factors: Iterable[Factor] | None = None,
) -> dict[LayerBits, PackedTensor]:
    """Round and pack the weight of one layer.

    Args:
        weight: The weight.
        layer: The layer.
        choices: Its candidates.
        importance: Mean square of the input of each column, see `weight_grid`; None if all are equal.
        factors: Factors for GPTQ: one for all rows or, for a stack, one for each matrix; None to round to nearest.

    Returns:
        `{candidate: packed weight}`.
    """
    axis = layer_kinds.get(layer.kind).channel_axis
    rows, front = channel_rows(weight, axis), max(weight.dim() - 2, 0) if axis < 0 else 0
    parts = len(weight) if weight.dim() == 3 else 1
    grids = []
    for bits in choices:
        scale, zero = weight_grid(
            rows, bits.weight, group_size=bits.group_size, symmetric=bits.symmetric, importance=importance
        )
        grids.append(WeightGrid(bits.weight, scale, zero, bits.group_size))
    found = [grid.nearest(rows) for grid in grids] if factors is None else _compensated(rows, grids, factors, parts)
    out = {}
    for bits, grid, values in zip(choices, grids, found, strict=True):
        values = values.reshape(weight.movedim(axis, front).shape).movedim(front, axis)
        flat = bits.group_size is None
        scale, zero = (x if x is None else (x.flatten() if flat else x).cpu() for x in (grid.scale, grid.zero_point))
        out[bits] = pack_weight(values.cpu(), scale, layer.kind, bits.weight, zero, bits.group_size)
    return out


def _compensated(rows: Tensor, grids: Sequence[WeightGrid], factors: Iterable[Factor], parts: int) -> list[Tensor]:
    """Round by GPTQ to the integers of each grid; the rows are cut into `parts` equal parts, one for each factor."""
    each = len(rows) // parts
    rounded = []
    for i, factor in enumerate(factors):
        part = slice(i * each, (i + 1) * each)
        cut = [
            g._replace(scale=g.scale[part], zero_point=None if g.zero_point is None else g.zero_point[part])
            for g in grids
        ]
        rounded.append(factor.round(rows[part], cut))
    return [torch.cat(found) for found in zip(*rounded, strict=True)]


def digest_of(*trees: Any) -> str:
    """Return the first 24 hexadecimal digits of a SHA-256 of all tensors, numbers and strings."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(trees):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, (int, float, str)):
            digest.update(f"{leaf!r} ".encode())
    return digest.hexdigest()[:24]
