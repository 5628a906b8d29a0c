"""The same random numbers for two networks, for models that draw some in their forward (masks of ViTMAE)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from ..errors import InvalidArgument

T = TypeVar("T")
State = tuple[torch.Tensor, torch.Tensor | None]


def rng_state(device: torch.device) -> State:
    """State of torch's generators, of the CPU's and of the device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _same(a: State, b: State) -> bool:
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


@contextmanager
def fixed_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Within it torch draws what follows from `seed`; afterwards it goes on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def replayed(run: Callable[[], T], device: torch.device, before: State) -> T:
    """What a reference gives on the random numbers that the network before it has seen; the generators then go on as if
    it had not run.

    Args:
        run: The reference's forward.
        device: Of the networks.
        before: `rng_state` before the network's own forward.

    Raises:
        InvalidArgument: The reference draws numbers, and not those that the network has drawn: what differs is then
            not quantization alone.
    """
    after = rng_state(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(before[0])
        if before[1] is not None:
            torch.cuda.set_rng_state(before[1], device)
        found = run()
        end = rng_state(device)
    if not _same(end, before) and not _same(end, after):
        raise InvalidArgument(
            "the model draws random numbers in its forward even in evaluation mode, and the quantized model cannot be "
            "given the same ones here (its dropout draws others); set its dropout to 0, or train on labels alone"
        )
    return found
