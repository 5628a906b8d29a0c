"""The same random numbers for two networks whose forward draws some, such as the masks of ViTMAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from ..errors import InvalidArgument

T = TypeVar("T")
State = tuple[torch.Tensor, torch.Tensor | None]


def rng_state(device: torch.device) -> State:
    """Return the state of torch's generators for the CPU and the device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _same(a: State, b: State) -> bool:
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


@contextmanager
def fixed_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's generators within the context, and restore their state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def replayed(run: Callable[[], T], device: torch.device, before: State) -> T:
    """Run a reference with the random numbers that a network has drawn; the generators' state is then restored.

    Args:
        run: The reference's forward.
        device: Device of the networks.
        before: `rng_state` before the network's forward.

    Returns:
        What `run` returned.

    Raises:
        InvalidArgument: The reference draws other random numbers than the network, so that quantization is not the only
            difference.
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
            "cannot distill this model: its forward draws random numbers even in evaluation mode, and dropout makes "
            "those of the quantized model differ; set dropout to 0, or train on labels alone"
        )
    return found
