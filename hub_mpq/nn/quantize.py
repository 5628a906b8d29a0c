"""Put quantizers into a model: every named layer is replaced by its quantized form, in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core import FLOAT_BITS, LayerBits, LayerGraph, LayerSpec, Policy
from ..core.layer_kind import layer_kinds
from ..cost.size import channel_count, row_shape
from ..errors import InvalidArgument, PolicyMismatch, UnsupportedLayer
from ..quantizers import LSQ, GroupedLSQ
from ..versions import warn_if_untested
from .layers import call_only, pad_only, replace_layer, take_over
from .types import layer_kind

Quantizers = tuple[nn.Module, nn.Module | None]
"""(quantizer of the weight, quantizer of the input or None for a float input)."""


@torch.no_grad()
def check_finite(model: nn.Module, names: Iterable[str]) -> None:
    """Check that the parameters of layers are finite.

    Args:
        model: The model.
        names: The layers to check.

    Raises:
        InvalidArgument: A weight or bias holds NaN or an infinite value.
    """
    for name in names:
        for part, parameter in model.get_submodule(name).named_parameters(recurse=False):
            if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
                raise InvalidArgument(f"cannot quantize layer {name!r}: its {part} contains NaN or infinite values")


def quantize_layer(module: nn.Module, name: str, weight: nn.Module, activation: nn.Module | None) -> nn.Module:
    """The quantized form of one layer.

    Args:
        module: The float layer.
        name: Its name, for error messages.
        weight: Quantizer of the weight.
        activation: Quantizer of the input; None leaves the input float.

    Returns:
        A layer with the same parameters (not copies) and hooks, plus the two quantizers.

    Raises:
        UnsupportedLayer: The exact type of the module has no quantized form.
    """
    kind = layer_kind(module)
    if kind is None:
        raise UnsupportedLayer(name, type(module).__qualname__)
    out = take_over(kind.quantized_class, module)
    out.float_class = type(module)
    call_only(out)
    device = module.weight.device
    out.weight_quantizer = weight.to(device)
    out.input_quantizer = None if activation is None else activation.to(device)
    return out.train(module.training)


def quantize_layers(
    model: nn.Module, graph: LayerGraph, names: Collection[str], make: Callable[[LayerSpec, nn.Module], Quantizers]
) -> dict[str, nn.Module]:
    """Replace layers of a model by their quantized forms, in place.

    Layers that share a Parameter share the weight quantizer of the first of them. Layers that read indices get no input
    quantizer.

    Args:
        model: The float model.
        graph: Its layers.
        names: The layers to replace.
        make: `make(layer, module)` returns the quantizers of one layer.

    Returns:
        {name: quantized layer} in the order of the graph.

    Raises:
        PolicyMismatch: A name is not in the graph.
        UnsupportedLayer: A layer has no quantized form.
    """
    warn_if_untested("torch")
    if extra := set(names) - set(graph.names):
        raise PolicyMismatch((), extra)
    chosen = [layer for layer in graph if layer.name in names]
    weights: dict[str, nn.Module] = {}
    for layer in sorted(chosen, key=lambda x: x.weight_owner is not None):
        module = model.get_submodule(layer.name)
        weight, inputs = make(layer, module)
        weights[layer.name] = weight = weights.get(layer.weight_owner or "", weight)
        new = quantize_layer(module, layer.name, weight, None if layer.weight_only else inputs)
        replace_layer(model, layer.name, new)
    pad_only(model, _classes())
    return {layer.name: model.get_submodule(layer.name) for layer in chosen}


def quantize_with_lsq(
    model: nn.Module,
    graph: LayerGraph,
    widths: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    *,
    per_channel: bool,
    log: bool = True,
    groups: Mapping[str, LayerBits] | None = None,
) -> dict[str, nn.Module]:
    """Replace layers of a model by layers with LSQ quantizers, in place. The scales still have to be calibrated.

    Args:
        model: The float model.
        graph: Its layers.
        widths: {layer name: (weight bit-widths, input bit-widths)}; without weight bit-widths a layer stays float,
            without input bit-widths its input does.
        per_channel: Use one weight scale per output channel instead of one per tensor.
        log: Learn the logarithm of the scales, see `LSQ`.
        groups: {layer name: groups and zero points of its weight}; the bit-widths in it are ignored.

    Returns:
        {name: quantized layer} in the order of the graph.

    Raises:
        PolicyMismatch: A name is not in the graph.
        UnsupportedLayer: A layer has no quantized form.
    """

    def make(layer: LayerSpec, module: nn.Module) -> Quantizers:
        weight, inputs = widths[layer.name]
        of_inputs = LSQ(inputs, signed=False, log=log) if inputs else None
        return weight_quantizer(layer, weight, (groups or {}).get(layer.name), per_channel, log), of_inputs

    return quantize_layers(model, graph, {name for name, (weight, _) in widths.items() if weight}, make)


def weight_quantizer(
    layer: LayerSpec, widths: Sequence[int], bits: LayerBits | None, per_channel: bool = True, log: bool = True
) -> LSQ:
    """The quantizer of a layer's weight, whose scales still have to be set.

    Args:
        layer: The layer.
        widths: Its bit-widths.
        bits: Its groups and zero points; None for neither.
        per_channel: For weights with neither: one scale per output channel instead of one per tensor.
        log: See `LSQ`.
    """
    kind = layer_kinds.get(layer.kind)
    if bits is None or not bits.grouped:
        channels = channel_count(layer.kind, layer.weight_shape) if per_channel else 1
        return LSQ(widths, signed=True, channels=channels, axis=kind.channel_axis, log=log)
    return GroupedLSQ(
        widths,
        row_shape(layer.kind, layer.weight_shape),
        group_size=bits.group_size,
        symmetric=bits.symmetric,
        transposed=kind.transposed,
        log=log,
    )


def quantize_to_policy(model: nn.Module, graph: LayerGraph, policy: Policy, *, per_channel: bool = True) -> None:
    """Put the quantizers of a policy into a model, in place. The scales still have to be calibrated.

    Args:
        model: The float model.
        graph: Its layers.
        policy: Their bit-widths.
        per_channel: Use one weight scale per output channel instead of one per tensor.

    Raises:
        PolicyMismatch: The policy is for other layers than the graph's.
        UnsupportedLayer: A layer has no quantized form.
    """
    policy.check(graph)

    def one(bits: int) -> tuple[int, ...]:
        return () if bits == FLOAT_BITS else (bits,)

    widths = {name: (one(bits.weight), one(bits.activation)) for name, bits in policy.bits.items()}
    quantize_with_lsq(model, graph, widths, per_channel=per_channel, groups=policy.bits)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with quantizers, in module order."""
    classes = _classes()
    for name, module in model.named_modules():
        if isinstance(module, classes):
            yield name, module


def _classes() -> tuple[type, ...]:
    return tuple(kind.quantized_class for kind in layer_kinds)
