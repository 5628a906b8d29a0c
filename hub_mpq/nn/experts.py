"""Experts that transformers stacks in one Parameter: each stack becomes a layer that is called expert by expert.

transformers lets other packages register experts implementations (`ALL_EXPERTS_FUNCTIONS`). The one registered here
calls a stack as a module on the tokens that reach an expert, so that stacks have hooks, quantizers and packed weights
like other layers. transformers' own implementations index the Parameter or pass all of it to one grouped product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import LSQ, Quantizer
from ..versions import warn_if_untested
from .fused import Product, quantized
from .packed import PackedLayer, packed_product
from .types import type_name

IMPLEMENTATION = "hub_mpq"
"""Name of the experts implementation in transformers' registry."""
_STACKS = ("gate_up_proj", "up_proj", "down_proj")
_LLAMA4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"
"""Experts with their own forward, which is replaced."""


class Stack(nn.Module):
    """Base of all forms of a stack.

    `forward(x, expert, tokens, count)`: x [rows, in] are the inputs of one expert, tokens [rows] the index of each row
    among `count` tokens; the output is [rows, out].
    """

    weight: Tensor
    transposed = False
    bias = None

    def conceal(self) -> nn.Parameter | None:
        """The Parameter that it replaces; None if it is not float."""
        return None

    def to_layers(self, state: dict[str, Tensor], name: str) -> None:
        """Rename the Parameter `name` in a state dict to a layer's weight, if this layer is float."""

    def to_parameter(self, state: dict[str, Tensor], name: str) -> None:
        """Rename the weight of the layer `name` in a state dict to the Parameter."""
        if f"{name}.weight" in state:
            state[name] = state.pop(f"{name}.weight")

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # so that an unpickled model runs
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class ExpertStack(Stack):
    """The matrices of all experts, weight [experts, out, in]. Its state dict uses the name of the Parameter that it
    replaces, so that the model's state dict does not change."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        register()

    def forward(self, x: Tensor, expert: int, tokens: Tensor | None = None, count: int = 0) -> Tensor:
        return Product(self.transposed).run(x, self.weight[expert], None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix.removesuffix(".")] = self.weight if keep_vars else self.weight.detach()

    def conceal(self) -> nn.Parameter | None:
        return self.weight  # type: ignore[return-value]

    def to_layers(self, state: dict[str, Tensor], name: str) -> None:
        if name in state:
            state[f"{name}.weight"] = state.pop(name)


class TransposedExpertStack(ExpertStack):
    """An ExpertStack with weight [experts, in, out]."""

    transposed = True


def _as_float(layer: Any) -> bool:
    """Whether the weight of a layer is [experts, in, out], as in its float form."""
    return bool(layer.float_class.transposed)


class QuantExperts(Stack):
    """A stack with a quantizer, which quantizes one expert at a time. Inputs stay float."""

    weight_quantizer: Any
    input_quantizer: None
    float_class: type[ExpertStack]
    transposed = property(_as_float)  # type: ignore[assignment]

    def forward(self, x: Tensor, expert: int, tokens: Tensor | None = None, count: int = 0) -> Tensor:
        q, product = self.weight_quantizer, Product(self.transposed)
        if type(q) is LSQ and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            operand = q.operand(self.weight, expert)
            if operand is not None:
                return quantized(product, x, self.weight[expert], None, None, operand)
        # quantizers that train bit-widths in a search take the whole weight
        weight = q.of_matrix(self.weight, expert) if isinstance(q, Quantizer) else q(self.weight)[expert]
        return product.run(x, weight.to(x.dtype), None)


class PackedExperts(PackedLayer, Stack):  # type: ignore[override]
    """A stack with packed weights that unpacks one expert at a time."""

    float_class: type[ExpertStack]
    transposed = property(_as_float)  # type: ignore[assignment]

    def forward(self, x: Tensor, expert: int, tokens: Tensor | None = None, count: int = 0) -> Tensor:
        return packed_product(self, Product(self.transposed), x, partial(self.unpacked_expert, expert))

    def unpacked_expert(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix of one expert, see `unpacked`."""
        kept = self.source.kept
        return (self.packed.matrix(expert, self.compute.dtype) if kept is None else kept[expert]).to(dtype)


def _to_layers(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Rename the Parameters of stacks to layers while a state dict is loaded."""
    for name in _STACKS:
        if isinstance(stack := module._modules.get(name), Stack):
            stack.to_layers(state_dict, prefix + name)


def _is_stack_parent(module: nn.Module) -> bool:
    """Whether transformers runs a module through its registry of experts implementations, or it is Llama 4's."""
    if type_name(module) == _LLAMA4 or isinstance(vars(module).get("_concealed", (None,))[0], type):
        return True
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed") and hasattr(module, "config")


def _way(module: Any) -> Any:
    """How a module computes its experts: an implementation in the registry, or a class with its own forward."""
    return module.config._experts_implementation if hasattr(module, "is_transposed") else type(module)


def _set_way(module: Any, way: Any) -> None:
    if isinstance(way, type):
        module.__class__ = way
    else:
        module.config._experts_implementation = way


def _calling_llama4() -> type[nn.Module]:
    from .llama4_experts import CallingLlama4Experts

    return CallingLlama4Experts


def has_stacked_experts(model: nn.Module) -> bool:
    """Whether `expose_experts` would find stacks that are not layers yet.

    Args:
        model: The model.
    """
    return any(
        isinstance(weight := module._parameters.get(name), Tensor) and weight.dim() == 3
        for module in model.modules()
        if _is_stack_parent(module)
        for name in _STACKS
    )


def expose_experts(model: nn.Module) -> bool:
    """Turn each stacked Parameter of experts into a layer under its own name, in place; `conceal_experts` undoes it.

    The Parameters stay the same objects, and the names in the state dict do not change. Other modules, and stacks that
    are layers already, are not changed.

    Args:
        model: The model.

    Returns:
        Whether it has such layers now.
    """
    found = False
    parents = [module for module in model.modules() if _is_stack_parent(module)]
    former = [_way(module) for module in parents]
    for module, way in zip(parents, former, strict=True):
        transposed = isinstance(way, type) or module.is_transposed
        for name in _STACKS:
            weight = module._parameters.get(name)
            if weight is None or weight.dim() != 3:
                continue
            delattr(module, name)
            setattr(module, name, (TransposedExpertStack if transposed else ExpertStack)(weight))
        if any(isinstance(module._modules.get(name), Stack) for name in _STACKS):
            found = True
            if "_concealed" not in vars(module):
                module._concealed = way, module.register_load_state_dict_pre_hook(_to_layers)
            _set_way(module, _calling_llama4() if isinstance(way, type) else IMPLEMENTATION)
    if found:
        warn_if_untested("transformers")
    return found


def stacks(model: nn.Module) -> list[tuple[str, str, Stack]]:
    """(name of the experts module, name of the stack in it, stack) of all stacks that are layers."""
    return [
        (parent, name, stack)
        for parent, module in model.named_modules()
        if _is_stack_parent(module)
        for name in _STACKS
        if isinstance(stack := module._modules.get(name), Stack)
    ]


def conceal_experts(model: nn.Module) -> None:
    """Turn stacks of experts that are float layers back into Parameters and restore transformers' implementation."""
    for module in [module for module in model.modules() if "_concealed" in vars(module)]:
        for name in _STACKS:
            stack = module._modules.get(name)
            if isinstance(stack, Stack) and (parameter := stack.conceal()) is not None:
                delattr(module, name)
                module.register_parameter(name, parameter)
        if not any(isinstance(module._modules.get(name), Stack) for name in _STACKS):
            way, hook = vars(module).pop("_concealed")
            _set_way(module, way)
            hook.remove()


def _routed(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens that reach it, index of the choice) for `chosen` [tokens, choices].

    On the meta device these are unknown, and one expert stands for all.
    """
    if chosen.is_meta:
        count, top = chosen.shape
        token = torch.arange(count, device="meta").repeat(top)
        yield 0, token, token
        return
    for expert in chosen.unique().tolist():
        if expert < experts:  # an index beyond is an empty slot (expert parallelism)
            choice, token = torch.where((chosen == expert).t())
            yield expert, token, choice


def stacked_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the same as transformers' own experts implementations, by calling the stacks.

    Args:
        self: The experts module.
        hidden_states: [tokens, in].
        top_k_index: The experts of each token, [tokens, choices].
        top_k_weights: The weights of their outputs, [tokens, choices].

    Returns:
        [tokens, out].
    """
    # sums over experts are rounded once, as in transformers' grouped products
    out = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))

    def product(name: str, x: Tensor, expert: int, tokens: Tensor) -> Tensor:
        stack = getattr(self, name)
        if isinstance(stack, Tensor):  # in a model that was built from this one's config
            x = Product(self.is_transposed).run(x, stack[expert], None)
        else:
            x = stack(x, expert, tokens, len(hidden_states))
        return x + getattr(self, f"{name}_bias")[expert] if self.has_bias else x

    for expert, tokens, choices in _routed(top_k_index, self.num_experts):
        x = product("gate_up_proj" if self.has_gate else "up_proj", hidden_states[tokens], expert, tokens)
        x = product("down_proj", self._apply_gate(x) if self.has_gate else self.act_fn(x), expert, tokens)
        if getattr(self, "has_post_expert_norm", False):
            x = self.post_expert_norm(x)
        x = x * top_k_weights[tokens, choices, None]
        out.index_add_(0, tokens, x.to(out.dtype))
    return out.to(hidden_states.dtype)


def register() -> None:
    """Register the experts implementation with transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, stacked_experts_forward)
