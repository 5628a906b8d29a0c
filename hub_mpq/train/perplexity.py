"""Per-token perplexity of a causal language model, in windows of a given length."""

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
"""Tokens in a window, unless the model supports fewer."""


class Windows(Sequence[dict[str, Tensor]]):
    """A text as overlapping windows, each a batch `{"input_ids", "labels"}` of one row; each token is scored once.

    Each window begins `stride` tokens after the previous one. Tokens that an earlier window scored are only context,
    with the label `ignore_index`. So is the first token of each window, which has no prediction.

    Args:
        ids: Token ids, shape `[tokens]`.
        context: Tokens in a window.
        stride: Tokens from one window to the next.
        ignore_index: Label of tokens that are not scored.
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
            labels[: self.context - self.stride] = self.ignore_index  # up to the end of the previous window
        return {"input_ids": row[None], "labels": labels[None]}

    @property
    def scored(self) -> int:
        """Number of scored tokens: all but the first; without overlap, all but the first of each window."""
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
    """Compute the perplexity of a text: exp of the mean −log p of its tokens.

    This is the method of transformers' guide "Perplexity of fixed-length models". The logits of one window are in
    memory at a time; the float32 losses are summed in float64.

    Args:
        model: A causal language model.
        ids: Token ids of the text: a tensor of shape `[tokens]`, or a sequence of integers.
        context: Tokens in a window; None for 1,024, or the model's maximum if that is less.
        stride: Tokens from one window to the next; None for `context`, so that windows do not overlap. With a smaller
            stride, each token is scored with at least context − stride tokens before it, and the evaluation takes
            context / stride times as long.
        task: Task of the model; None to infer it from the model.
        example: One input as the network takes it.

    Returns:
        The task's metrics per token, including "perplexity", and the number of scored "tokens", the "context" and the
        "stride". "samples" is the number of windows.

    Raises:
        InvalidArgument: The model is not a causal language model, a length is out of range, or `ids` are fewer than two
            or outside the model's vocabulary.
    """
    known = task_of(task, model, example=example)
    if not isinstance(known, CausalLM):
        raise InvalidArgument(f"perplexity needs a causal language model, got {type(model).__name__}")
    try:
        ids = torch.as_tensor(ids).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"token ids must be integers: {error}") from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or len(ids) < 2:
        raise InvalidArgument(f"ids must be at least two integer token ids, got {len(ids)} of {ids.dtype}")
    ids = ids.long()
    config: Any = getattr(model, "config", None)
    words = config.get_text_config().vocab_size if hasattr(config, "get_text_config") else None
    if words is not None and not (int(ids.min()) >= 0 and int(ids.max()) < words):
        raise InvalidArgument(
            f"token ids of this model must be from 0 to {words - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    most = most_tokens(model)
    if context is None:
        context = min(CONTEXT, most or CONTEXT)
    stride = context if stride is None else stride
    if context < 2 or (most is not None and context > most):
        raise InvalidArgument(
            f"context must be {f'from 2 to {most}' if most else 'at least 2'} tokens for this model, got {context}"
        )
    if not 1 <= stride <= context:
        raise InvalidArgument(f"stride must be from 1 to {context} tokens, the context, got {stride}")
    windows = Windows(ids, context, stride, known.ignore_index)
    found = evaluate(model, windows, task=known, example=example)
    return {**found, "tokens": windows.scored, "context": context, "stride": stride}
