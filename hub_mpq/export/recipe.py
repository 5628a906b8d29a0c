"""A policy as a recipe for llm-compressor, which computes its own scales and rounding."""

from __future__ import annotations

import json
import re

from ..core import FLOAT_BITS
from ..pack import Manifest
from .compressed_tensors import input_scheme_of, scheme_of
from .vllm import stored_bits

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def llm_compressor_recipe(manifest: Manifest) -> str:
    """Convert a policy to a recipe for llm-compressor.

    There is one group of layers per pair of bit-widths, group size and symmetry, named as in compressed-tensors. Layers
    with the same role in several blocks become one regular expression. Embeddings, and heads tied to them, are omitted,
    because readers of compressed-tensors do not support them.

    Args:
        manifest: The manifest of a policy for which `exportable` is true.

    Returns:
        The recipe, YAML.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.export import llm_compressor_recipe
        >>> from hub_mpq.pack import Manifest
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> graph = HubMPQ.from_module(net, torch.zeros(1, 32)).graph
        >>> print(llm_compressor_recipe(Manifest("net", None, "module", graph, Policy.uniform(graph, "W4A8"))))
        default_stage:
          default_modifiers:
            GPTQModifier:
              config_groups:
        ...
    """
    shared = {layer.weight_owner for layer in manifest.graph}
    groups: dict[str, dict[str, list[str]]] = {}
    schemes, stored = {}, stored_bits(manifest)
    for layer in manifest.graph:
        bits = stored[layer.name]
        if layer.kind == "embedding" or layer.name in shared or layer.weight_owner is not None or bits.weight > 8:
            continue
        name = str(bits).removesuffix(f"A{FLOAT_BITS}")
        schemes[name] = {"weights": scheme_of(bits)}
        if (inputs := input_scheme_of(bits, symmetric=False)) is not None:
            schemes[name]["input_activations"] = inputs
        numbers = _NUMBER.findall(layer.name)
        place = re.escape(layer.name) if len(numbers) != 1 else "#".join(map(re.escape, _NUMBER.split(layer.name)))
        groups.setdefault(name, {}).setdefault(place, []).extend(numbers[:1] if len(numbers) == 1 else [])
    lines = ["default_stage:", "  default_modifiers:", "    GPTQModifier:", "      config_groups:"]
    for name, places in groups.items():
        lines += [f"        {name}:", "          targets:"]
        for place, numbers in places.items():
            lines.append(f"          - {json.dumps('re:^' + place.replace('#', '(' + '|'.join(numbers) + ')') + '$')}")
        lines += [f"          {part}: {json.dumps(scheme)}" for part, scheme in schemes[name].items()]
    return "\n".join(lines)
