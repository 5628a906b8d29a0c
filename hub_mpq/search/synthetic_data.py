"""Inputs for calibration when the user gives none: noise, drawn towards the statistics that BatchNorm remembers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..adapters.count import storage_key
from ..adapters.forward import call
from ..adapters.restore_state import state_restored
from ..nn.layers import first_operand

STEPS = 20
BATCH = 8
_KEPT = {"mask", "masks", "label", "labels", "target", "targets", "position", "positions"}
"""Words in the names of inputs that stay as the example has them."""
_LOOKUPS = {"embedding": 0, "_embedding_bag": 0, "_embedding_bag_forward_only": 0, "index_select": None, "gather": None}
"""{operator that looks rows up: the axis of the table, None where an argument tells}."""
_COPIES = ("_to_copy", "clone")


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which table each of some tensors of indices is looked up in, while it is entered.

    `found`: {storage key of the indices: {storage key of the table: its rows}}.
    """

    def __init__(self, model: nn.Module, indices: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tables = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
        self.origin = {storage_key(t): storage_key(t) for t in indices}
        self.alive: list[Tensor] = []  # a freed storage's key may come again
        self.found: dict[int, dict[int, int]] = defaultdict(dict)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in _COPIES and (origin := self.origin.get(storage_key(args[0]))) is not None:
            self.origin[storage_key(out)] = origin
            self.alive.append(out)
        if name in _LOOKUPS:
            axis = _LOOKUPS[name]
            table, indices = (args[0], args[1]) if axis is not None else (args[0], args[2])
            origin = self.origin.get(storage_key(indices))
            if origin is not None and storage_key(table) in self.tables:
                self.found[origin][storage_key(table)] = table.shape[args[1] if axis is None else axis]
        return out


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(key of the nearest mapping, tensor) of every tensor, however it is nested."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, str(key))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part, name)


def _counts_up(x: Tensor) -> bool:
    return x.ndim > 0 and x.shape[-1] > 1 and bool((x.diff(dim=-1) == 1).all())


def _tokens(model: nn.Module, example: Any) -> dict[int, int]:
    """{id of a tensor of ids: how many there are}: what looks rows of a table up and is no position.

    Positions count up by one and have a table of their own, beside the larger one of the tokens.
    """
    whole = [x for _, x in _leaves(example) if x.dtype in (torch.int32, torch.int64)]
    if not whole:
        return {}
    with state_restored(model), _Lookups(model, whole) as lookups:
        call(model, example)
    read = [x for x in whole if storage_key(x) in lookups.found]
    tables = [lookups.found[storage_key(x)] for x in read]
    rows = [min(found.values()) for found in tables]
    up = [_counts_up(x) for x in read]
    positions = {
        i
        for i in range(len(read))
        for j in range(len(read))
        if up[i] and (j < i or not up[j]) and rows[j] > rows[i] and not tables[i].keys() & tables[j].keys()
    }
    return {id(x): rows[i] for i, x in enumerate(read) if i not in positions}


def _vocabulary(config: Any) -> tuple[int | None, list[int]]:
    """How many tokens a transformers config knows, None for any other, and which of them have a meaning, such as the
    end of a text or the place of an image."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    pairs = [pair for part in (config, text) for pair in getattr(part, "__dict__", {}).items()]
    special = {v for k, v in pairs if k.endswith(("token_id", "token_index")) and type(v) is int}
    return getattr(text, "vocab_size", None), sorted(special)


def _is_mask(x: Tensor) -> bool:
    """Whether floats are zeros and ones, or zeros and what an addition removes."""
    zero = x == 0
    return bool(zero.any()) and bool((~zero).any()) and bool((zero | (x == 1)).all() or (zero | (x <= -1e4)).all())


class _Drawing:
    """The inputs of a synthetic batch, drawn one by one.

    Inputs get `BATCH` samples, or, where one of them lacks the batch axis of the first, keep their shapes.
    """

    def __init__(self, model: nn.Module, example: Any, seed: int) -> None:
        top = list(example.values()) if isinstance(example, Mapping) else list(example)
        tensors = [x for _, x in _leaves(example) if x.ndim]
        first = next((x for x in top if isinstance(x, Tensor) and x.ndim), None)
        self.alike = first is not None and all(x.shape[0] == first.shape[0] for x in tensors)
        self.alone = len(tensors) == 1
        self.tokens = _tokens(model, example)
        self.vocabulary, special = _vocabulary(getattr(model, "config", None))
        self.special = torch.tensor(special, dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            return {k: self.draw(v, str(k)) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self.draw(v, name) for v in value) if type(value) in (tuple, list) else value
        return self._tensor(value, name) if isinstance(value, Tensor) else value

    def _tensor(self, x: Tensor, name: str) -> Tensor:
        samples = x[:1].expand(BATCH, *x.shape[1:]).clone() if self.alike and x.ndim else x.clone()
        samples = samples.cpu()
        if _KEPT & set(name.split("_")):
            return samples
        if x.is_floating_point():
            if x.ndim < (1 if self.alone else 2) or _is_mask(x):
                return samples
            return torch.randn(samples.shape, generator=self.generator).to(x.dtype)
        return self._ids(samples, self.tokens[id(x)]) if id(x) in self.tokens else samples

    def _ids(self, samples: Tensor, count: int) -> Tensor:
        """Random ids; of a text, those with a meaning stay where they are and are drawn nowhere else."""
        text = self.vocabulary is not None and count >= self.vocabulary
        ids = torch.randint(self.vocabulary if text else count, samples.shape, generator=self.generator)
        ids = ids.to(samples.dtype)
        if not text:
            return ids
        special = self.special.to(samples.dtype)
        return torch.where(torch.isin(samples, special) | torch.isin(ids, special), samples, ids)


def _by_name(model: nn.Module, example: Any) -> Any:
    """The example with keywords for several positional inputs, where the model's forward has names for them."""
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, Mapping) or len(example) < 2:
        return example
    parameters = list(inspect.signature(model.forward).parameters.values())[: len(example)]
    if len(parameters) < len(example) or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return example
    return {p.name: value for p, value in zip(parameters, example, strict=True)}


def synthetic_batch(model: nn.Module, example: Any, seed: int = 0) -> Any:
    """A batch shaped like `example`: Gaussian noise for float inputs, random ids for tokens and types of tokens.

    What is looked up in which table is seen in one forward on the example. Masks, positions, labels, single numbers
    and whole numbers that nothing looks up stay as the example has them. Several positional inputs become keywords.

    With BatchNorm layers, float noise is optimised for a few steps so that each norm's input has the mean and
    variance it remembers (the idea of ZeroQ, Cai et al., 2020) [our schedule].
    """
    example = _by_name(model, example)
    batch = _Drawing(model, example, seed).draw(example)
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        batch = batch[0]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or not isinstance(batch, Tensor) or not batch.is_floating_point():
        return batch
    return _match_statistics(model, norms, batch)


def _match_statistics(model: nn.Module, norms: list[nn.modules.batchnorm._BatchNorm], batch: Tensor) -> Tensor:
    device = next(model.parameters()).device
    losses: list[Tensor] = []

    def hook(norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = first_operand(args, kwargs).float()
        axes = [d for d in range(x.dim()) if d != 1]
        sigma = norm.running_var.clamp_min(1e-8).sqrt()
        mean = (x.mean(axes) - norm.running_mean) / sigma
        spread = x.var(axes, unbiased=False).clamp_min(1e-8).sqrt() / sigma - 1
        losses.append(mean.square().mean() + spread.square().mean())

    training = model.training
    model.eval()
    handles = [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in norms]
    x = batch.to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    try:
        with torch.enable_grad():
            for _ in range(STEPS):
                losses.clear()
                model(x)
                (grad,) = torch.autograd.grad(torch.stack(losses).mean(), [x])
                x.grad = grad
                optimizer.step()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return x.detach()
