"""Experts that are separate modules in a list, of which a router selects a few per token (NLLB-MoE, Switch)."""

from __future__ import annotations

from torch import Tensor, nn

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def routed_experts(model: nn.Module) -> list[dict[str, str]]:
    """Find lists of experts. Which experts run depends on the data, so some may not run in a few batches.

    A list counts as experts if its members (except those without weights, such as a dropout) have one type and weights
    of the same names and shapes, and if it or its parent has the number of experts as an attribute (num_experts,
    num_local_experts, n_routed_experts). This is our construction.

    Args:
        model: The model.

    Returns:
        For each layer with a weight in an expert, {expert: the layer's name in that expert}, in module order.
    """
    modules = dict(model.named_modules())
    found: list[dict[str, str]] = []
    for name, module in modules.items():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or len(module) < 2:
            continue
        holder = modules[name.rpartition(".")[0]]
        experts = {key: child for key, child in module.named_children() if any(True for _ in child.parameters())}
        counts = [getattr(said, key, None) for said in (module, holder) for key in _COUNTS]
        if len(experts) not in counts or len({type(expert) for expert in experts.values()}) > 1:
            continue
        weights, *others = map(_weights, experts.values())
        if all(other == weights for other in others):
            found += [{key: f"{name}.{key}.{inner}".rstrip(".") for key in experts} for inner in weights]
    return found


def _weights(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """{layer: shape of its weight}."""
    layers = ((name, getattr(layer, "weight", None)) for name, layer in module.named_modules())
    return {name: tuple(weight.shape) for name, weight in layers if isinstance(weight, Tensor)}
