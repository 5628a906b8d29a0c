"""Run a deep model block by block on many batches, with the memory of one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn

from .blocks import Call, replaced_forward

_SAMPLE = 1 << 10  # values of an output that are compared
_SAME = 1e-3


class BlockWalk:
    """Runs a model block by block on the hidden states of all batches."""

    def __init__(self, model: nn.Module, blocks: dict[str, nn.Module], batches: Sequence[Any], run: Any) -> None:
        self.model, self.blocks, self.batches, self.run = model, blocks, batches, run
        self.order: list[str] = []
        self.outputs: dict[str, Tensor] = {}
        self.tails: dict[str, tuple[Any, ...] | None] = {}
        self.calls: list[dict[str, Call]] = []
        self.hidden: list[Tensor] = []

    @classmethod
    def start(
        cls, model: nn.Module, blocks: dict[str, nn.Module], batches: Sequence[Any], run: Any
    ) -> BlockWalk | None:
        """Compute the hidden states before the first block; None for a model that cannot run block by block."""
        walk = cls(model, blocks, batches, run)
        if not walk._look(batches[0]):
            return None
        for batch in batches:
            calls = walk._calls(batch)
            if list(calls) != walk.order:
                return None
            hidden = calls[walk.order[0]].hidden
            if hidden is None:
                return None
            walk.hidden.append(hidden)
            walk.calls.append({name: call.at(None) for name, call in calls.items()})
        return walk

    def _look(self, batch: Any) -> bool:
        """Run the model on a batch and record what its blocks return; False if a block runs twice or returns more than
        its hidden state."""
        fine = True

        def hook(name: str) -> Callable[..., None]:
            def look(_module: nn.Module, _args: Any, output: Any) -> None:
                nonlocal fine
                hidden, tail = (output[0], output[1:]) if type(output) is tuple and output else (output, None)
                if name in self.outputs or not isinstance(hidden, Tensor) or any(x is not None for x in tail or ()):
                    fine = False
                    return
                self.order.append(name)
                self.outputs[name], self.tails[name] = _sample(hidden), tail

            return look

        with ExitStack() as stack:
            for name, block in self.blocks.items():
                stack.callback(block.register_forward_hook(hook(name)).remove)
            self.run(self.model, batch)
        return fine and bool(self.order)

    def _returned(self, name: str, hidden: Any) -> Any:
        tail = self.tails[name]
        return hidden if tail is None else (hidden, *tail)

    def _calls(self, batch: Any) -> dict[str, Call]:
        """{block: its arguments}, from a forward in which each block returns its own input."""
        calls: dict[str, Call] = {}

        def forward(name: str) -> Callable[..., Any]:
            def keep(*args: Any, **kwargs: Any) -> Any:
                calls[name] = Call(args, kwargs)
                if name == self.order[-1]:
                    raise _Stop
                return self._returned(name, calls[name].hidden)

            return keep

        with replaced_forward({self.blocks[name]: forward(name) for name in self.order}), suppress(_Stop):
            self.run(self.model, batch)
        return calls

    def step(self, name: str, before: Callable[[Any], None]) -> bool:
        """Run a block on all batches.

        Args:
            name: The block, the next in `order`.
            before: Called with each batch before the block runs on it.

        Returns:
            False if the output of the first batch differs from that of the model's own forward.
        """
        for i, batch in enumerate(self.batches):
            before(batch)
            call = self.calls[i].pop(name).at(self.hidden[i])
            output = self.blocks[name](*call.args, **call.kwargs)
            self.hidden[i] = output[0] if isinstance(output, tuple) else output
            if i == 0 and not _same(_sample(self.hidden[0]), self.outputs[name]):
                return False
        return True

    def run_around(self, i: int) -> None:
        """Run everything before and after the blocks on one batch."""

        def forward(name: str) -> Callable[..., Any]:
            def skip(*args: Any, **kwargs: Any) -> Any:
                last = name == self.order[-1]
                return self._returned(name, self.hidden[i] if last else Call(args, kwargs).hidden)

            return skip

        with replaced_forward({self.blocks[name]: forward(name) for name in self.order}):
            self.run(self.model, self.batches[i])


class _Stop(Exception):
    """Ends a forward at its last block."""


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().flatten()
    return flat[:: max(flat.numel() // _SAMPLE, 1) | 1].float().clone()


def _same(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).norm() <= _SAME * wanted.norm())
