"""A tiny decoder whose tokenizer knows forty words, and a text of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{i}" for i in range(40)]


def save_tokenizer(folder: Path) -> Path:
    """Words by whitespace; what it does not know is <unk>, and nothing is added in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def decoder(seed: int = 0, **changes: Any) -> Any:
    """A llama of random weights that takes 64 tokens of 48."""
    import transformers

    values = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    values |= {"vocab_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**values, **changes})).eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # distributions that are not flat
    return model


def save_decoder(folder: Path, **changes: Any) -> Path:
    """Its folder, with the tokenizer."""
    decoder(**changes).save_pretrained(folder)
    return save_tokenizer(folder)


def words(count: int, seed: int = 0) -> str:
    """A text of that many words."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))
