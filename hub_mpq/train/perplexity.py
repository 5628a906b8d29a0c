"""Perplexity by token of a causal language model, in windows of a stated length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument
from ..tasks import CausalLM, TaskLike, task_of
from ..tasks.tokens import most_tokens
from .evaluate import Figures, evaluate

CONTEXT = 1024
"""Tokens of a window, unless the model takes fewer."""


class Windows(Sequence[dict[str, Tensor]]):
    """A text as overlapping windows, each a batch {"input_ids", "labels"} of one row: every token is scored once.

    A window begins `stride` tokens behind the one before. Tokens that an earlier window scored are context, their
    labels `ignore_index`; so is the first token of each window, which nothing predicts.

    Args:
        ids: Token ids, [tokens].
        context: Tokens of a window.
        stride: Tokens from one window to the next.
        ignore_index: Label of what is not scored.
    """

    def __init__(self, ids: Tensor, context: int, stride: int, ignore_index: int = -100) -> None:
        self.ids, self.context, self.stride, self.ignore_index = ids, context, stride, ignore_index
        self.length = 1 + max(0, -(-(len(ids) - context) // stride))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        begin = index * self.stride
        row = self.ids[begin : begin + self.context]
        labels = row.clone()
        if index:
            labels[: self.context - self.stride] = self.ignore_index  # up to where the window before ended
        return {"input_ids": row[None], "labels": labels[None]}

    @property
    def scored(self) -> int:
        """Tokens that are scored: all but the first; without overlap, all but the first of each window."""
        return len(self.ids) - (self.length if self.stride == self.context else 1)


def perplexity(
    model: nn.Module,
    ids: Any,
    *,
    context: int | None = None,
    stride: int | None = None,
    task: TaskLike = None,
    example: Any = None,
) -> Figures:
    """exp of the mean of −log p of all tokens of a text, as transformers' guide "Perplexity of fixed-length models".

    Logits of one window are held at a time; the loss is summed in float64 of float32 values.

    Args:
        model: A causal language model.
        ids: Token ids of the text, [tokens] or anything of that many integers.
        context: Tokens of a window; None: 1,024, or what the model takes if that is less.
        stride: Tokens from one window to the next; None: `context`, so that windows do not overlap. With a smaller one
            each token is scored with at least context − stride tokens before it, and it takes context / stride times as
            long.
        task, example: As in `evaluate`.

    Returns:
        The task's metrics by token, "perplexity" among them, with the number of "tokens" scored, "context" and
        "stride"; "samples" are windows.

    Raises:
        InvalidArgument: The model is no causal language model, a length is out of range, or `ids` are fewer than two,
            or no token ids of the model.
    """
    known = task_of(task, model, example=example)
    if not isinstance(known, CausalLM):
        raise InvalidArgument(f"{type(model).__name__} is no causal language model, which perplexity is measured of")
    try:
        ids = torch.as_tensor(ids).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"token ids are whole numbers: {error}") from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or len(ids) < 2:
        raise InvalidArgument(f"perplexity needs two token ids or more, not {len(ids)} of {ids.dtype}")
    ids = ids.long()
    config: Any = getattr(model, "config", None)
    words = config.get_text_config().vocab_size if hasattr(config, "get_text_config") else None
    if words is not None and not (int(ids.min()) >= 0 and int(ids.max()) < words):
        raise InvalidArgument(f"token ids of this model are 0 to {words - 1}, not {int(ids.min())} to {int(ids.max())}")
    most = most_tokens(model)
    if context is None:
        context = min(CONTEXT, most or CONTEXT)
    stride = context if stride is None else stride
    if context < 2 or (most is not None and context > most):
        raise InvalidArgument(f"context is 2 to {most or 'any number of'} tokens for this model, not {context}")
    if not 1 <= stride <= context:
        raise InvalidArgument(f"stride is 1 to {context} tokens, the context, not {stride}")
    windows = Windows(ids, context, stride, known.ignore_index)
    found = evaluate(model, windows, task=known, example=example)
    return {**found, "tokens": windows.scored, "context": context, "stride": stride}
