"""Quantize a float transformers model in place, after it is loaded."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..adapters import build_graph, norm_of
from ..adapters.base import noise, placed
from ..adapters.example_inputs import example_for
from ..adapters.transformers import head_of
from ..core import Candidates, IndicatorOptions, LayerBits, LayerGraph, Policy
from ..errors import InvalidArgument
from ..nn.expose import expose_layers
from ..nn.packing import base_nbytes
from ..nn.split_experts import split_experts, split_stacks
from ..pack import Manifest
from ..report import warn_of_not_run
from ..search.candidates import first_groups, resolve_candidates
from ..search.policy_search import longest_header, search_policy
from ..search.scores import candidates_of, score_table
from ..search.synthetic_data import synthetic_batch
from ..search.train_scores import train_scores
from ..train.apply_policy import apply_policy
from ..train.round_weights import chosen_rounding
from .folder import read_folder_indicators
from .plugin_load import network_of


def quantize_in_place(model: Any, config: Any, revision: str | None = None) -> Manifest:
    """Quantize a loaded float model as an MPQConfig asks.

    Scales of inputs are calibrated on up to 4 batches, or on synthetic inputs with one warning. Weight-only policies
    are rounded by GPTQ on up to 16 batches, unless the config says otherwise.

    Args:
        model: The float model.
        config: An MPQConfig.
        revision: Commit of the Hub repo that the float weights came from, if any.

    Returns:
        The manifest of the quantized model.

    Raises:
        InfeasibleBudget: No policy meets the budget.
        InvalidArgument: The model is offloaded.
    """
    if any(p.is_meta for p in model.parameters()):
        raise InvalidArgument("an offloaded model cannot be quantized; load it without device_map='auto'")
    model.eval()
    net = network_of(model)
    expose_layers(net)
    scores = None
    if config.budget is not None and Path(model.name_or_path).is_dir():
        scores = read_folder_indicators(model.name_or_path)
    named = config.policy.bits if isinstance(config.policy, Policy) else {}
    split_experts(net, split_stacks([*named, *(() if scores is None else (*scores.weight, *scores.pairs))]))
    example, graph = _graph(model, net, config.exclude, revision)
    warn_of_not_run(graph)
    batch = synthetic_batch(net, example)
    manifest = Manifest(graph.model_id, graph.revision, graph.library, graph, Policy.uniform(graph, "W2A2"))
    policy = config.policy
    if config.budget is not None:
        if scores is None:
            warnings.warn(
                "no stored indicators: searching with untrained scales on synthetic inputs; use "
                "HubMPQ.quantize(train=…) for a learned policy",
                stacklevel=2,
            )
            with torch.no_grad():
                norms = norm_of(net, example)
            untrained = IndicatorOptions(steps=0)
            scores = train_scores(
                net, graph, norms, [batch], resolve_candidates(graph, None), untrained, example=example
            )
        table, _ = score_table(scores, graph)
        if config.group_size is not None or not config.symmetric:
            widths = {name: Candidates(c.weight, c.activation) for name, c in candidates_of(table).items()}
            wanted = resolve_candidates(graph, widths, config.group_size, config.symmetric)
            table, _ = score_table(scores, graph, wanted)
        base = base_nbytes(net, replace(manifest, policy=longest_header(manifest.policy, table)))
        budget = config.budget.with_groups(*first_groups(candidates_of(table)))
        policy = search_policy(graph, table, budget, base_bytes=base, sense=scores.sense).policy
    else:
        policy = Policy.uniform(graph, policy) if isinstance(policy, LayerBits) else policy
        policy.check(graph)
        policy = policy.with_groups(graph, config.group_size, config.symmetric)
    if config.calibration is None and any(bits.activation <= 8 for bits in policy.bits.values()):
        warnings.warn(
            "no calibration batches: scales of inputs are calibrated on synthetic data; pass "
            "MPQConfig(…, calibration=batches)",
            stacklevel=2,
        )
    data = [batch] if config.calibration is None else config.calibration
    rounding = chosen_rounding(config.rounding, policy, config.calibration, config.per_channel)
    apply_policy(net, graph, policy, data, per_channel=config.per_channel, example=example, rounding=rounding)
    config.budget = config.calibration = None  # no longer needed; copies of the config must not hold data
    return Manifest(graph.model_id, graph.revision, graph.library, graph, policy, {"hub_mpq": __version__})


def _graph(model: Any, net: nn.Module, exclude: Any, revision: str | None) -> tuple[Any, LayerGraph]:
    # publish the name of a local folder, not its path
    name = Path(model.name_or_path).name if Path(model.name_or_path).is_dir() else model.name_or_path
    common: dict[str, Any] = {"model_id": name, "revision": revision, "exclude": exclude}
    if net is not model:
        size = (model.config.pretrained_cfg or {}).get("input_size", (3, 224, 224))
        example: Any = (placed(noise(1, *size, like=net), net),)
        return example, build_graph(net, example, library="timm", **common)
    example = placed(example_for(model), model)
    return example, build_graph(model, example, library="transformers", head=head_of(model), **common)
