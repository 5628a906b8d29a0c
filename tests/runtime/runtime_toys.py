"""Small networks for the tests of runtimes."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from hub_mpq import HubMPQ


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen_data(net: nn.Module, x: Tensor) -> nn.Module:
    """A network whose norms have seen data, so that its outputs depend on its inputs."""
    with torch.no_grad():
        net.train()
        for _ in range(20):
            net(x)
    return net.eval()


def timm_net(name: str, size: int = 32, **kwargs: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model(name, num_classes=7, **kwargs)
        return seen_data(net, noise(16, 3, size, size))


def quantized(net: nn.Module, level: str, x: Tensor | dict[str, Tensor], **kwargs: Any) -> HubMPQ:
    """A network at one level; `x` calibrates it and is the example."""
    one = {k: v[:1] for k, v in x.items()} if isinstance(x, dict) else x[:1]
    return HubMPQ.from_module(net, one, **kwargs).apply_policy(level, [x])


def bert(**kwargs: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(**{**sizes, "vocab_size": 60, "max_position_embeddings": 64, "num_labels": 3, **kwargs})
        return BertForSequenceClassification(config).eval()


def tokens(batch: int = 4, length: int = 12, vocabulary: int = 60) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def words(vocabulary: int = 60) -> Any:
    """A tokenizer of the words w2, w3, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
