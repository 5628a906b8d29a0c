"""The Python of the README's first screen and of the guide to decoders runs as it stands, on tiny models."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]


def code_of(page, word):
    """The first Python block of a page that holds a word."""
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    return next(block for block in found if word in block)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a block in an empty folder, with other model ids; returns its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "write-token")

    def run(code, ids, **given):
        for name, ours in ids.items():
            assert name in code
            code = code.replace(name, ours)
        exec(compile(code, "README.md", "exec"), given)  # noqa: S102
        return given

    return run


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.hub
def test_a_timm_model(hub, run, capsys):
    images = torch.randn(8, 3, 160, 160)
    loader = DataLoader(list(zip(images, torch.arange(8), strict=True)), batch_size=4)
    code = code_of("README.md", '"resnet18"')
    names = run(
        code, {'"resnet18"': '"test_resnet", pretrained=False'}, train_loader=loader, val_loader=loader, images=images
    )
    assert "BitOps" in capsys.readouterr().out
    assert names["logits"].shape == (8, 1000)
    assert len(code.strip().splitlines()) <= 10
    assert "model.mpq.safetensors" in hub.store.content("me/resnet18-mpq")
    with torch.no_grad():
        assert torch.corrcoef(torch.stack([names["logits"].flatten(), names["mpq"](images).flatten()]))[0, 1] > 0.99


def test_a_transformers_model(run, tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "float")
    ids = torch.arange(64).view(8, 8)
    rows = [{"input_ids": row, "attention_mask": torch.ones(8).long(), "labels": i % 3} for i, row in enumerate(ids)]
    loader = DataLoader(rows, batch_size=4)
    batch = {key: value for key, value in next(iter(loader)).items() if key != "labels"}
    names = run(
        code_of("README.md", "AutoModelForSequenceClassification"),
        {"textattack/bert-base-uncased-SST-2": str(tmp_path / "float")},
        **{"train_loader": loader, "val_loader": loader, "batch": batch},
    )
    with torch.no_grad():
        torch.testing.assert_close(names["logits"], names["model"](**batch).logits, rtol=0.05, atol=0.05)


def test_a_decoder(run, tmp_path):
    import tokenizers

    vocabulary = {word: i for i, word in enumerate(["?", ".", *(f"w{i}" for i in range(62))])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token=".")
    tokenizer.save_pretrained(tmp_path / "float")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    (tmp_path / "test.txt").write_text(" ".join(f"w{i % 62}" for i in range(2000)))
    chunks = [{"input_ids": torch.arange(64).roll(i)[None]} for i in range(8)]
    names = run(
        code_of("examples/guides/decoders.md", "weight_only"),
        {"HuggingFaceTB/SmolLM2-135M": str(tmp_path / "float")},
        chunks=chunks,
    )
    out = names["model"](**chunks[0]).logits
    assert torch.equal(out, names["mpq"](**chunks[0]).logits)
