"""A class for every token: token classification, masked and causal language models, sequence to sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.task import register_task
from .classes import Classes


class TokenClassification(Classes):
    """A class for every token, such as named entities.

    Logits are `[batch, tokens, classes]`, labels `[batch, tokens]`. Metrics are accuracy in percent and the loss.

    Args:
        ignore_index: Label that is excluded from losses, metrics and counts; None for none.
        label_keys: Keys of labels in a dict; None for `labels`, `label` (plain networks: also `target`, `y`).
        output: Which part of the network's output the labels are for, a key or a position; see `Task`.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import TokenClassification
        >>> logits, labels = torch.zeros(1, 3, 2), torch.tensor([[0, 1, -100]])
        >>> values, mask = TokenClassification().item_loss(logits, labels)
        >>> mask
        tensor([[ True,  True, False]])
    """

    name = "token-classification"
    positional = True


class MaskedLM(Classes):
    """Masked language models: the tokens at masked positions.

    Logits are `[batch, tokens, vocabulary]`, labels `[batch, tokens]` with `ignore_index` at all positions that are not
    masked. Metrics are perplexity, accuracy in percent, and the loss.

    Args:
        ignore_index: Label that is excluded from losses, metrics and counts; None for none.
        label_keys: Keys of labels in a dict; None for `labels`, `label` (plain networks: also `target`, `y`).
        output: Which part of the network's output the labels are for, a key or a position; see `Task`.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import MaskedLM
        >>> task = MaskedLM()
        >>> logits, labels = torch.zeros(1, 3, 10), torch.tensor([[-100, 7, -100]])
        >>> round(task.figures(task.metrics(logits, labels, samples=1))["perplexity"], 3)
        10.0
    """

    name = "masked-lm"
    positional = True

    def figures(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """As `Task.figures`, plus the perplexity, from the mean loss over all tokens of the data."""
        found = super().figures(sums)
        if "loss" in found:
            found["perplexity"] = math.exp(min(found["loss"], 700.0))
        return found


class CausalLM(MaskedLM):
    """Causal language models: the next token at every position.

    Labels `[batch, tokens]` are the input tokens themselves; they are shifted here. Logits and metrics are those of
    `MaskedLM`.

    Args:
        ignore_index: Label that is excluded from losses, metrics and counts; None for none.
        label_keys: Keys of labels in a dict; None for `labels`, `label` (plain networks: also `target`, `y`).
        output: Which part of the network's output the labels are for, a key or a position; see `Task`.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import CausalLM
        >>> ids = torch.tensor([[3, 1, 2]])
        >>> CausalLM().aligned(ids, torch.zeros(1, 3, 10))
        tensor([[   1,    2, -100]])
    """

    name = "causal-lm"

    def aligned(self, labels: Any, logits: Tensor) -> Tensor:
        found = super().aligned(labels, logits)
        last = torch.full_like(found[:, :1], self.ignore_index)
        return torch.cat([found[:, 1:], last], 1)

    def counted(self, labels: Tensor) -> Tensor:
        return super().counted(labels[:, 1:] if labels.dim() > 1 else labels)

    def sample(self, output: Any, generator: torch.Generator) -> Any:
        drawn = super().sample(output, generator)
        if drawn is None:
            return None
        first = torch.full_like(drawn[:, :1], self.ignore_index)
        return torch.cat([first, drawn[:, :-1]], 1)


class Seq2SeqLM(MaskedLM):
    """Encoder-decoders: the tokens of the target sequence.

    Labels are `[batch, target tokens]`, from which the model builds the decoder's input. Logits and metrics are those
    of `MaskedLM`.

    Args:
        ignore_index: Label that is excluded from losses, metrics and counts; None for none.
        label_keys: Keys of labels in a dict; None for `labels`, `label` (plain networks: also `target`, `y`).
        output: Which part of the network's output the labels are for, a key or a position; see `Task`.

    Example:
        >>> import torch
        >>> from hub_mpq.tasks import Seq2SeqLM
        >>> Seq2SeqLM().loss(torch.zeros(1, 2, 10), torch.tensor([[4, -100]]))
        tensor(2.3026)
    """

    name = "seq2seq-lm"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs, labels = self.parts(batch)
        if labels is not None and kwargs.get("decoder_input_ids") is None and "labels" in self.signature.names:
            kwargs["labels"] = labels
        return args, kwargs

    def mask(self, batch: Any) -> Tensor | None:
        """Positions of the decoder that count: from its own mask, else from the labels.

        Args:
            batch: One batch.

        Returns:
            `[batch, target tokens]`; None if the batch has neither.
        """
        _, kwargs, labels = self.parts(batch)
        found = kwargs.get("decoder_attention_mask")
        if isinstance(found, Tensor):
            return found.bool()
        return labels != self.ignore_index if isinstance(labels, Tensor) else None


def most_tokens(model: nn.Module) -> int | None:
    """Maximum number of tokens that a transformers model takes at once; None if its config sets no limit."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


for _task in (TokenClassification(), MaskedLM(), CausalLM(), Seq2SeqLM()):
    register_task(_task)
