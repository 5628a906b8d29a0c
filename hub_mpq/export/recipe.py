"""A policy as a recipe for llm-compressor, which makes its own scales and rounds by itself."""

from __future__ import annotations

import json
import re

from ..core import FLOAT_BITS
from ..pack import Manifest
from .compressed_tensors import input_scheme_of, scheme_of
from .vllm import stored_bits

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def llm_compressor_recipe(manifest: Manifest) -> str:
    """The recipe, YAML: one group of layers for each pair of widths, group size and symmetry, named as in
    compressed-tensors.

    Layers of one place in several blocks stand as one regular expression. Embeddings, and heads that are one, are left
    out, since compressed-tensors' readers take none.

    Args:
        manifest: Of a policy that `exportable` says compressed-tensors can hold.
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
