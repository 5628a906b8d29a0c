"""The operations that stay float, with their name, reason and multiply-accumulates."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from torch import nn

from ..core import FloatOp
from ..core.layer import NOT_RUN
from ..nn.types import layer_kind, why_not
from .forward import ForwardRecord

_WEIGHTY = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
)
Row = tuple[str, str, str]
"""Name, kind and reason of a FloatOp."""


def weighty(module: nn.Module) -> bool:
    """Whether a module is a layer that multiplies its input by its own weight, or looks it up in it."""
    return isinstance(module, _WEIGHTY) or layer_kind(module) is not None


def replaced_parameters(modules: Mapping[str, nn.Module], quantized: Collection[str]) -> set[int]:
    """ids of the Parameters that only quantized layers hold as their weight, so that no float copy is kept."""
    mine = {id(modules[name].weight) for name in quantized}
    others = {id(p) for name, m in modules.items() if name not in quantized for p in m._parameters.values()}
    return mine - others


def float_ops(
    modules: Mapping[str, nn.Module],
    run: ForwardRecord,
    quantized: Collection[str],
    excluded: Collection[str],
    outside: Collection[str],
) -> tuple[FloatOp, ...]:
    """Every product outside the quantized layers, and every layer that stays float even if it multiplied nothing.

    A layer is listed under its own name, even if its weight is used without calling it; a product of two activations is
    listed under the module in which it ran, with kind "attention" or "matmul". Each Parameter of which a float copy is
    kept counts in one row. `excluded`: layers excluded by the user; `outside`: layers whose weight was read while they
    were not running.
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
    for name, module in modules.items():
        if weighty(module) and name not in quantized and name not in listed:
            row = name, type(module).__name__, _reason(module, name in excluded, ran=name in ran or name in outside)
            rows[row] += 0
            weights[row] += _matrices(module)
    counted = replaced_parameters(modules, quantized)
    ops = []
    for (name, kind, reason), count in rows.items():
        new = {id(p): p.numel() for p in weights[name, kind, reason] if id(p) not in counted}
        counted |= new.keys()
        ops.append(FloatOp(name, kind, count // run.batch, sum(new.values()), reason))
    return tuple(ops)


def _product(
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    where: str,
    part: str,
    fused: bool,
    excluded: Collection[str],
) -> tuple[Row, list[nn.Parameter]]:
    """The row of a product, from the running module and the Parameter or buffer that took part."""
    module, weight = modules[where], parameters.get(part)
    kind = type(module).__name__
    own = [p for p in module._parameters.values() if p is not None]
    if weight is not None and all(p is not weight for p in own):
        owner, _, key = part.rpartition(".")
        name = owner if key == "weight" else part
        return (name, type(modules[owner]).__name__, _reason(modules[owner], owner in excluded, ran=True)), [weight]
    if weight is not None or weighty(module) or (own and _matrices(module) and not list(module.children())):
        # its own weight, plain or standardised, normalised or masked before use
        if weight is None or weighty(module):
            return (where or part, kind, _reason(module, where in excluded, ran=True)), _matrices(module)
        own_one = f"its {weight.ndim}-D Parameter {part.rpartition('.')[2]}"
        reason = f"{kind} multiplies by {own_one} and has no quantized form"
        return (where or part, kind, why_not(module, reason)), [weight]
    attention = fused or any(word in f"{where} {kind}".lower() for word in ("attention", "attn"))
    reason = f"product with the buffer {part}" if part else "product of two activations"
    return (where or kind, "attention" if attention else "matmul", reason), []


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a layer: `weight`, or the matrices it has instead (recurrent and parametrized layers)."""
    weight = module._parameters.get("weight")
    own = [p for p in module.parameters(recurse=False) if p.ndim >= 2] if weight is None else [weight]
    return own or [p for p in module.parameters() if p.ndim >= 2]


def _reason(module: nn.Module, excluded: bool, *, ran: bool) -> str:
    if excluded:
        return "excluded by the user"
    return why_not(module) or ("its weight is used outside its own forward" if ran else NOT_RUN)
