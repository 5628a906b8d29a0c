"""Tiny hub models, built from configs, for tests over HTTP."""

import torch

from hub_mpq import HubMPQ

CARD = "---\nlicense: mit\npipeline_tag: feature-extraction\n---\n# base\n"
IDS = torch.arange(8).reshape(1, 8)
IMAGE = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def float_bert(folder):
    """{name: bytes} of a float BERT with a card and a tokenizer."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"pickle")
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def timm_toy():
    """A quantized timm network of 5 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, num_classes=5)
    mpq._own_weights = False  # as if they were the published ones
    return mpq.apply_policy("W4A8", [IMAGE])
