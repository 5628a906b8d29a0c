"""What stays float, by name and reason, with the multiply-accumulates it costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from torch import nn

from ..nn.types import layer_kind, why_not
from ..spec import FloatOp
from .forward import Run

_WEIGHTY = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
)


def weighty(module: nn.Module) -> bool:
    """Whether a module is a layer that multiplies its input by, or looks it up in, a weight of its own."""
    return isinstance(module, _WEIGHTY) or layer_kind(module) is not None


def float_ops(
    modules: Mapping[str, nn.Module], run: Run, quantized: Collection[str], excluded: Collection[str]
) -> tuple[FloatOp, ...]:
    """Every product outside the quantized layers, and every layer left float even if it multiplied nothing.

    A layer goes by its own name, and so does one whose weight is used without calling it; a product of two
    activations by the name of the module in which it ran, kind "attention" or "matmul". Each Parameter is counted
    in one row, and in none when a quantized layer has it.
    """
    parameters = {
        f"{name}.{key}" if name else key: value
        for name, module in modules.items()
        for key, value in module._parameters.items()
        if value is not None
    }
    rows: Counter[Row] = Counter()
    weights: dict[Row, list[nn.Parameter]] = defaultdict(list)
    for (where, part, fused), count in run.macs.items():
        if where not in quantized:
            row, used = _product(modules, parameters, where, part, fused, excluded)
            rows[row] += count
            weights[row] += used
    ran = {c.name for c in run.calls}
    listed = {name for name, _, _ in rows}
    counted = {id(modules[name].weight) for name in quantized}
    for name, module in modules.items():
        if weighty(module) and name not in quantized and name not in listed and not _alias(module, counted):
            reason = _reason(module, name in excluded) if name in ran else "it does not run in the traced forward"
            rows[name, type(module).__name__, reason] += 0
            weights[name, type(module).__name__, reason] += _matrices(module)
    ops = []
    for (name, kind, reason), count in rows.items():
        new = {id(p): p.numel() for p in weights[name, kind, reason] if id(p) not in counted}
        counted |= new.keys()
        ops.append(FloatOp(name, kind, count // run.batch, sum(new.values()), reason))
    return tuple(ops)


Row = tuple[str, str, str]
"""Name, kind and reason of a FloatOp."""


def _product(
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    where: str,
    part: str,
    fused: bool,
    excluded: Collection[str],
) -> tuple[Row, list[nn.Parameter]]:
    """Which row a product belongs to, given the running module and the Parameter or buffer that took part."""
    module, weight = modules[where], parameters.get(part)
    kind = type(module).__name__
    own = [p for p in module._parameters.values() if p is not None]
    if weight is not None and all(p is not weight for p in own):
        owner, _, key = part.rpartition(".")
        name = owner if key == "weight" else part
        return (name, type(modules[owner]).__name__, "its weight is used outside its own forward"), [weight]
    if weight is not None or weighty(module) or (_matrices(module) and not list(module.children())):
        # a weight of its own, as it is or standardised, normalised, masked before use
        return (where or part, kind, _reason(module, where in excluded)), [weight] if weight is not None else own
    name = kind.lower()
    kind = "attention" if fused or "attention" in name or "attn" in name else "matmul"
    return (where, kind, f"product with the buffer {part}" if part else "product of two activations"), []


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None and p.ndim >= 2]


def _alias(module: nn.Module, counted: Collection[int]) -> bool:
    return any(id(p) in counted for p in _matrices(module))


def _reason(module: nn.Module, excluded: bool) -> str:
    return "excluded by the user" if excluded else why_not(module) or "its weight is used outside its own forward"
