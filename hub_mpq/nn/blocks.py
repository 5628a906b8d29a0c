"""The blocks of a deep model: consecutive modules of one type that pass on a hidden state."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint


class Call(NamedTuple):
    """The arguments of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor | None:
        """The hidden state, the first argument; None if that is not a floating-point tensor."""
        first = next(iter((*self.args, *self.kwargs.values())), None)
        return first if isinstance(first, Tensor) and first.is_floating_point() else None

    def at(self, hidden: Tensor | None) -> Call:
        """The same call on another hidden state."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, next(iter(self.kwargs)): hidden})

    @property
    def plain(self) -> bool:
        """Whether all arguments are tensors and constants rather than objects that a call changes, such as a cache."""
        return _plain((self.args, *self.kwargs.values()))


def _plain(x: Any) -> bool:
    if isinstance(x, tuple):
        return all(map(_plain, x))
    return x is None or isinstance(x, (Tensor, int, float, str, torch.Size, torch.dtype, torch.device))


def blocks_of(model: nn.Module, weights: Mapping[str, int]) -> dict[str, nn.Module]:
    """{name: block} of a model in order; {} if it has none.

    The blocks are the children of the outermost `nn.ModuleList` or `nn.Sequential` whose children have the same type
    and contain at least half of the weights.

    Args:
        model: The model.
        weights: {layer: number of weights} of the layers to quantize.
    """
    whole = sum(weights.values())
    for prefix, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        if len({type(child) for child in module}) > 1 or len({id(child) for child in module}) < len(module):
            continue
        found = {f"{prefix}.{name}" if prefix else name: child for name, child in module.named_children()}
        held = sum(count for layer, count in weights.items() if block_with(found, layer))
        if 2 * held >= whole > 0:
            return found
    return {}


def block_with(blocks: Collection[str], layer: str) -> str | None:
    """Name of the block that contains a layer; None if it is in none."""
    return next((name for name in blocks if layer.startswith(f"{name}.")), None)


@contextmanager
def replaced_forward(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules run functions instead of their forward, within the context.

    Args:
        replaced: {module: function of the forward's arguments}.
    """
    own = {module: vars(module).get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before


@contextmanager
def cache_off(model: nn.Module) -> Iterator[None]:
    """Switch off the key-value cache of a transformers model, within the context."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if getattr(config, "use_cache", False) is True}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Checkpoint blocks: nothing is kept for the backward pass, which runs each block again; within the context.

    Hidden states are stored in temporary files, so that a backward pass takes the memory of one block at any depth. The
    input of a block gets a gradient even if nothing before it has one. A block whose arguments are more than tensors
    and constants (`Call.plain`) runs unchanged.

    Args:
        blocks: The blocks, in eval mode.
    """

    def again(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = Call(args, kwargs)
            if not torch.is_grad_enabled() or call.hidden is None or not call.plain:
                return own(*args, **kwargs)
            hidden = call.hidden if call.hidden.requires_grad else call.hidden.detach().requires_grad_()
            leaves, form = tree_flatten(call.at(hidden))
            # gradients only flow through positional arguments; nothing else may hold a tensor
            tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
            constants = [None if i in tensors else leaf for i, leaf in enumerate(leaves)]
            places: list[int] = list(tensors)
            structure: list[Any] = []

            def run(*given: Tensor) -> tuple[Any, ...]:
                filled = list(constants)
                for i, tensor in zip(places, given, strict=True):
                    filled[i] = tensor
                inner: Call = tree_unflatten(filled, form)
                inner = inner.at(given[0].clone())  # the block may change it in place
                found, made = tree_flatten(own(*inner.args, **inner.kwargs))
                structure[:] = [made]
                return tuple(found)

            with _on_disk(hidden):
                found = checkpoint(run, *tensors.values(), use_reentrant=True)
            return tree_unflatten(list(found), structure[0])

        return forward

    with replaced_forward({block: again(block.forward) for block in blocks}):
        yield


def _on_disk(hidden: Tensor) -> AbstractContextManager[None]:
    """Store the hidden state that autograd saves in a temporary file, which is deleted with the graph."""

    place = hidden.data_ptr()

    def store(x: Tensor) -> Any:
        if x.data_ptr() != place:
            return x
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed and gone with the graph
        left = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        while left:
            left = left[file.write(left) :]
        return file, x.dtype, x.shape, x.device

    def load(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        file, dtype, shape, device = kept
        file.seek(0)
        return torch.frombuffer(bytearray(file.read()), dtype=dtype).view(shape).to(device)

    return torch.autograd.graph.saved_tensors_hooks(store, load)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disable the gradients of all parameters of a model, within the context."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
