"""Synthetic inputs for calibration without data: noise, optimised towards the statistics of BatchNorm."""

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
from ..nn.types import device_of
from ..tasks import to_device

STEPS = 20
BATCH = 8
_KEPT = {"mask", "masks", "label", "labels", "target", "targets", "position", "positions"}
"""Words in the names of inputs that are copied from the example."""
_LOOKUPS = {"embedding": 0, "_embedding_bag": 0, "_embedding_bag_forward_only": 0, "index_select": None, "gather": None}
"""{operator that looks up rows: the axis of the table, None if it is an argument}."""
_COPIES = ("_to_copy", "clone")


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which table each of some tensors of indices is looked up in.

    An index that is out of range raises IndexError, before CUDA would abort the context of the process.

    Attributes:
        found: `{storage key of the indices: {storage key of the table: number of its rows}}`.
    """

    def __init__(self, model: nn.Module, indices: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tables = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
        self.origin = {storage_key(t): storage_key(t) for t in indices}
        self.alive: list[Tensor] = []  # the key of a freed storage may be reused
        self.found: dict[int, dict[int, int]] = defaultdict(dict)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        _check_indices(name, args)
        out = func(*args, **(kwargs or {}))
        if name in _COPIES and (origin := self.origin.get(storage_key(args[0]))) is not None:
            self.origin[storage_key(out)] = origin
            self.alive.append(out)
        if name in _LOOKUPS:
            table, indices, rows = _lookup(name, args)
            origin = self.origin.get(storage_key(indices))
            if origin is not None and storage_key(table) in self.tables:
                self.found[origin][storage_key(table)] = rows
        return out


def _lookup(name: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, int]:
    """Return the table, the indices and the number of rows of an operator that looks up rows."""
    axis = _LOOKUPS[name]
    if axis is not None:
        return args[0], args[1], args[0].shape[axis]
    return args[0], args[2], args[0].shape[args[1]] if args[0].ndim else 1


def _check_indices(name: str, args: tuple[Any, ...]) -> None:
    if name in _LOOKUPS:
        _, indices, rows = _lookup(name, args)
        least, pairs = 0, [(indices, rows)]
    elif name == "index":  # table[indices], where negative indices count from the end
        whole = [x if x is not None and x.dtype in (torch.int32, torch.int64) else None for x in args[1]]
        masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        pairs = [] if masked else [(x, n) for x, n in zip(whole, args[0].shape, strict=False) if x is not None]
        least = -1
    else:
        return
    for x, n in pairs:
        if x.numel() and not x.is_meta and not (least * n <= x.min() and x.max() < n):
            raise IndexError(f"index out of range of a table of {n} rows")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (key of the innermost mapping, tensor) of every nested tensor."""
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
    """Return `{id() of a tensor of token ids: number of tokens}`: the indices into a table that are not positions.

    Positions count up by one and have their own table, which is smaller than that of the tokens.
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
    """Return the number of tokens of a transformers config, and the special ones, such as the end of a text.

    For other configs the number is None.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    pairs = [pair for part in (config, text) for pair in getattr(part, "__dict__", {}).items()]
    special = {v for k, v in pairs if k.endswith(("token_id", "token_index")) and type(v) is int}
    return getattr(text, "vocab_size", None), sorted(special)


def _is_mask(x: Tensor) -> bool:
    """Whether floats are a mask: zeros and ones, or zeros and large negative numbers."""
    zero = x == 0
    return bool(zero.any()) and bool((~zero).any()) and bool((zero | (x == 1)).all() or (zero | (x <= -1e4)).all())


class _Drawing:
    """Draw the inputs of a synthetic batch, one by one.

    Inputs have `BATCH` samples, or keep their shapes if one of them does not have the batch axis of the first.

    Attributes:
        leaves: id() of each tensor of the example.
        drawn: Those that are drawn; the others are copied from the example.
        alike: Whether inputs have `BATCH` samples.
    """

    def __init__(self, model: nn.Module, example: Any, seed: int) -> None:
        inside = example[0] if len(example) == 1 and not isinstance(example, Mapping) else example
        top = list(inside.values()) if isinstance(inside, Mapping) else list(example)
        tensors = [x for _, x in _leaves(example) if x.ndim]
        first = next((x for x in top if isinstance(x, Tensor) and x.ndim), None)
        self.leaves = [id(x) for _, x in _leaves(example)]
        self.drawn = set(self.leaves)
        self.alike = first is not None and all(x.shape[0] == first.shape[0] for x in tensors)
        self.alone = len(tensors) == 1
        self.tokens = _tokens(model, example)
        self.vocabulary, special = _vocabulary(getattr(model, "config", None))
        self.special = torch.tensor(special, dtype=torch.int64)
        self.seed = seed

    def batch(self, example: Any) -> Any:
        self.generator = torch.Generator().manual_seed(self.seed)
        return self.draw(example)

    def draw(self, value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            return {k: self.draw(v, str(k)) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self.draw(v, name) for v in value) if type(value) in (tuple, list) else value
        return self._tensor(value, name) if isinstance(value, Tensor) else value

    def _tensor(self, x: Tensor, name: str) -> Tensor:
        samples = x[:1].expand(BATCH, *x.shape[1:]).clone() if self.alike and x.ndim else x.clone()
        samples = samples.cpu()
        if id(x) not in self.drawn or _KEPT & set(name.split("_")):
            return samples
        if x.is_floating_point():
            if x.ndim < (1 if self.alone else 2) or _is_mask(x):
                return samples
            return torch.randn(samples.shape, generator=self.generator).to(x.dtype)
        return self._ids(samples, self.tokens[id(x)]) if id(x) in self.tokens else samples

    def _ids(self, samples: Tensor, count: int) -> Tensor:
        """Draw random ids; special tokens of a text keep their places and are not drawn."""
        text = self.vocabulary is not None and count >= self.vocabulary
        ids = torch.randint(self.vocabulary if text else count, samples.shape, generator=self.generator)
        ids = ids.to(samples.dtype)
        if not text:
            return ids
        special = self.special.to(samples.dtype)
        return torch.where(torch.isin(samples, special) | torch.isin(ids, special), samples, ids)


def _by_name(model: nn.Module, example: Any) -> Any:
    """Turn several positional inputs of the example into keywords, if the model's forward has names for them."""
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, Mapping) or len(example) < 2:
        return example
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())[: len(example)]
    except ValueError:  # TorchScript has no names
        return example
    if len(parameters) < len(example) or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return example
    return {p.name: value for p, value in zip(parameters, example, strict=True)}


def _runs(model: nn.Module, batch: Any) -> bool:
    """Whether a model runs on a batch."""
    try:
        with state_restored(model), _Lookups(model, []):
            call(model, to_device(batch, device_of(model)))
    except Exception:  # a model may raise anything on values or sizes that it does not expect
        return False
    return True


def _drawn(model: nn.Module, example: Any, seed: int) -> Any:
    """Draw as many inputs of the example as the model runs on, with `BATCH` samples if it accepts them."""
    drawing = _Drawing(model, example, seed)
    for several in (True, False):
        drawing.alike &= several
        drawing.drawn = set(drawing.leaves)
        if _runs(model, batch := drawing.batch(example)):
            return batch
        drawing.drawn = set()
        if not _runs(model, drawing.batch(example)):
            continue
        for leaf in drawing.leaves:
            drawing.drawn.add(leaf)
            if not _runs(model, drawing.batch(example)):
                drawing.drawn.remove(leaf)
        return drawing.batch(example)
    return example


def synthetic_batch(model: nn.Module, example: Any, seed: int = 0) -> Any:
    """Create a batch like the example: Gaussian noise for float inputs, random ids for tokens and token types.

    One forward on the example shows which inputs are looked up in which table. The following are copied from the
    example: masks, positions, labels, single numbers, integers that are not looked up, and inputs for which the model
    does not accept other values, such as corners of boxes. If the model does not accept several samples, the batch has
    the shapes of the example. Several positional inputs become keywords or, without names, `((first, second),)`.

    With BatchNorm layers, float noise is optimised for a few steps so that the input of each norm has the mean and
    variance of its running statistics. This is the idea of ZeroQ (Cai et al., 2020), with our own schedule.

    Args:
        model: The network.
        example: One input as the network takes it.
        seed: Seed of the noise.
    """
    batch = _drawn(model, _by_name(model, example), seed)
    if isinstance(batch, Mapping):
        return batch
    if len(batch) != 1 or not isinstance(batch[0], (Tensor, Mapping)):
        return (tuple(batch),)
    if isinstance(batch[0], Mapping):
        return tuple(batch)
    (batch,) = batch
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    return _match_statistics(model, norms, batch) if norms and batch.is_floating_point() else batch


def _match_statistics(model: nn.Module, norms: list[nn.modules.batchnorm._BatchNorm], batch: Tensor) -> Tensor:
    losses: list[Tensor] = []

    def hook(norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = first_operand(args, kwargs).float()
        axes = [d for d in range(x.dim()) if d != 1]
        sigma = norm.running_var.clamp_min(1e-8).sqrt()
        mean = (x.mean(axes) - norm.running_mean) / sigma
        spread = x.var(axes, unbiased=False).clamp_min(1e-8).sqrt() / sigma - 1
        losses.append(mean.square().mean() + spread.square().mean())

    x = batch.to(device_of(model)).requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    with state_restored(model), torch.enable_grad():
        handles = [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in norms]
        try:
            for _ in range(STEPS):
                losses.clear()
                model(x.clone())  # a copy, which the model may modify
                if not any(loss.requires_grad for loss in losses):
                    break
                (x.grad,) = torch.autograd.grad(torch.stack(losses).mean(), [x])
                optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
    return x.detach()
