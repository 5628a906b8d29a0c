"""Put quantizers into a model: every named layer becomes its quantized form, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..core import FLOAT_BITS, LayerGraph, Policy
from ..errors import PolicyMismatch, UnsupportedLayer
from ..quantizers import LSQ
from ..versions import warn_if_untested
from .layers import CHANNEL_AXIS, QUANTIZED
from .types import layer_kind


def quantize_layer(module: nn.Module, name: str, weight: LSQ, activation: LSQ | None) -> nn.Module:
    """The quantized form of `module`: same parameters (not copies), same hooks, plus two quantizers.

    Raises UnsupportedLayer unless the module's exact type has a quantized form.
    """
    kind = layer_kind(module)
    if kind is None:
        raise UnsupportedLayer(name, type(module).__qualname__)
    cls = QUANTIZED[kind]
    out = cls.__new__(cls)
    out.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    if kind == "conv2d":
        out.same_padding = type(module).__name__ == "Conv2dSame"
    weight_device = module.weight.device
    out.weight_quantizer = weight.to(weight_device)
    out.input_quantizer = activation.to(weight_device) if activation is not None else None
    return out.train(module.training)


def swap(
    model: nn.Module,
    graph: LayerGraph,
    widths: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    *,
    per_channel: bool,
    log: bool = True,
) -> None:
    """Replace the layers named in `widths` ({name: (weight widths, activation widths)}) in place.

    An empty tuple of widths leaves that operand float. A layer that shares its Parameter with another
    (`weight_owner`) shares its weight quantizer too. `per_channel`: one weight scale per output channel.
    Raises PolicyMismatch for names the graph does not have.
    """
    warn_if_untested("torch")
    if extra := set(widths) - set(graph.names):
        raise PolicyMismatch((), extra)
    made: dict[str, LSQ] = {}
    for name in sorted(widths, key=lambda n: graph[n].weight_owner is not None):
        layer, (weight_bits, input_bits) = graph[name], widths[name]
        if not weight_bits:
            continue
        weight = made.get(layer.weight_owner or "")
        if weight is None:
            axis = CHANNEL_AXIS[layer.kind]
            channels = layer.weight_shape[axis] if per_channel else 1
            weight = LSQ(weight_bits, signed=True, channels=channels, axis=axis, log=log)
        made[name] = weight
        activation = LSQ(input_bits, signed=False, log=log) if input_bits and not layer.weight_only else None
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, quantize_layer(getattr(owner, leaf), name, weight, activation))


def swap_policy(model: nn.Module, graph: LayerGraph, policy: Policy, *, per_channel: bool = True) -> None:
    """Put the quantizers of a policy in, one width each. Scales still have to be calibrated."""
    policy.check(graph)

    def one(bits: int) -> tuple[int, ...]:
        return () if bits == FLOAT_BITS else (bits,)

    swap(
        model,
        graph,
        {name: (one(bits.weight), one(bits.activation)) for name, bits in policy.bits.items()},
        per_channel=per_channel,
    )


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer that carries quantizers, in module order: one of the classes of `layers`."""
    kinds = tuple(QUANTIZED.values())
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module
