"""Quantize a float model of transformers in place, behind its loading."""

from __future__ import annotations

import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import build_graph, norm_of
from ..adapters.base import noise, placed
from ..adapters.transformers import example_for, head_of
from ..core import Budget, Candidates, LayerBits, LayerGraph, Policy
from ..cost.size import layer_nbytes
from ..errors import InvalidArgument
from ..nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs
from ..nn.packing import predicted_nbytes
from ..nn.quantize import quantize_to_policy
from ..pack import Manifest
from ..search.candidates import resolve_candidates
from ..search.joint import train_indicators
from ..search.policy_search import search_policy
from ..search.scores import default_alpha, limpq_scores
from ..search.synthetic_data import synthetic_batch
from ..train.batch import forward, to_device
from .folder import read_folder_indicators
from .plugin_load import network_of

_BATCHES = 4


def quantize_in_place(model: Any, config: Any, revision: str | None = None) -> Manifest:
    """Put quantizers into a loaded float model as an MPQConfig asks; returns the manifest of the result.

    revision: commit of the Hub repository that the float weights were taken from, if any.
    Scales of least squared error from up to 4 calibration batches, or from synthetic inputs with one warning.
    Raises what HubMPQ.search raises.
    """
    if any(p.is_meta for p in model.parameters()):
        raise InvalidArgument("a model that is offloaded can't be quantized; load it whole, without device_map='auto'")
    model.eval()
    net = network_of(model)
    example, graph = _graph(model, net, config.exclude, revision)
    batch = synthetic_batch(net, example)
    library = graph.library
    manifest = Manifest(graph.model_id, graph.revision, library, graph, Policy.uniform(graph, "W2A2"))
    policy = config.policy
    if config.budget is not None:
        policy = _search(net, example, graph, config.budget, batch, predicted_nbytes(net, manifest), model.name_or_path)
    elif isinstance(policy, LayerBits):
        policy = Policy.uniform(graph, policy)
    policy.check(graph)
    if config.calibration is None and any(bits.activation <= 8 for bits in policy.bits.values()):
        warnings.warn(
            "no calibration batches: scales of activations come from synthetic inputs; pass "
            "MPQConfig(…, calibration=batches) for real ones",
            stacklevel=2,
        )
    data = [batch] if config.calibration is None else islice(config.calibration, _BATCHES)
    device = next(model.parameters()).device
    taken = [to_device(x, device) for x in data]
    if not taken:
        raise InvalidArgument("the calibration data are empty")
    quantize_to_policy(net, graph, policy, per_channel=config.per_channel)
    calibrate_weights(net, mse=True)
    calibrate_inputs(net, sample_inputs(net, taken, forward), mse=True)
    config.budget = config.calibration = None  # served; a copy of the config must not drag data along
    return Manifest(graph.model_id, graph.revision, library, graph, policy, _provenance())


def _provenance() -> dict[str, Any]:
    from .._version import __version__

    return {"hub_mpq": __version__}


def _graph(model: Any, net: nn.Module, exclude: Any, revision: str | None) -> tuple[Any, LayerGraph]:
    common: dict[str, Any] = {"model_id": model.name_or_path, "revision": revision, "exclude": exclude}
    if net is not model:
        size = (model.config.pretrained_cfg or {}).get("input_size", (3, 224, 224))
        example: Any = (placed(noise(1, *size, like=net), net),)
        return example, build_graph(net, example, library="timm", **common)
    example = placed(example_for(model), model)
    return example, build_graph(model, example, library="transformers", head=head_of(model), **common)


def _search(
    net: nn.Module, example: Any, graph: LayerGraph, budget: Budget, batch: Any, smallest: int, folder: str
) -> Policy:
    """The best policy within the budget, with stored indicators or data-free ones. `smallest`: bytes at W2A2."""
    found = read_folder_indicators(folder) if Path(folder).is_dir() else None
    if found is None:
        warnings.warn(
            "no stored indicators: searching with scales that were not trained, on synthetic inputs; "
            "HubMPQ.quantize(train=…) gives a policy that was learned",
            stacklevel=3,
        )
        with torch.no_grad():
            norms = norm_of(net, example)
        found = train_indicators(net, graph, norms, [batch], resolve_candidates(graph, None), steps=0)
    candidates = {
        layer.name: Candidates(
            tuple(found.weight.get(layer.name, (2,))), tuple(found.activation.get(layer.name, (32,)))
        )
        for layer in graph.searched
    }
    low = LayerBits(2, 2)
    base = smallest - sum(layer_nbytes(layer, low) for layer in graph.searched)
    scores = limpq_scores(found, graph, candidates, default_alpha(found))
    return search_policy(graph, scores, budget, base_bytes=base).policy
