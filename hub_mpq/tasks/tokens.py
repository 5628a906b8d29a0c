"""Classes of tokens: token classification, masked and causal language models, sequence to sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.task import register_task
from .classes import Classes


class TokenClassification(Classes):
    """A class for every token: logits [batch, tokens, classes], labels [batch, tokens]."""

    name = "token-classification"
    positional = True


class MaskedLM(Classes):
    """The words at masked places: labels [batch, tokens] with `ignore_index` everywhere else."""

    name = "masked-lm"
    positional = True

    def figures(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """With the perplexity, from the mean over all tokens of the data."""
        found = super().figures(sums)
        if "loss" in found:
            found["perplexity"] = math.exp(min(found["loss"], 700.0))
        return found


class CausalLM(MaskedLM):
    """The next word at every place: labels [batch, tokens] are the tokens themselves, the shift happens here."""

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
    """The target sequence, word by word, for encoder-decoders. The model makes the decoder's input of the labels."""

    name = "seq2seq-lm"

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs, labels = self.parts(batch)
        if labels is not None and kwargs.get("decoder_input_ids") is None and "labels" in self.signature.names:
            kwargs["labels"] = labels
        return args, kwargs

    def mask(self, batch: Any) -> Tensor | None:
        """Places of the decoder that count: by its own mask, else by the labels."""
        _, kwargs, labels = self.parts(batch)
        found = kwargs.get("decoder_attention_mask")
        if isinstance(found, Tensor):
            return found.bool()
        return labels != self.ignore_index if isinstance(labels, Tensor) else None


def most_tokens(model: nn.Module) -> int | None:
    """Tokens that a model of transformers takes at once; None where its config names no end."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


for _task in (TokenClassification(), MaskedLM(), CausalLM(), Seq2SeqLM()):
    register_task(_task)
