"""Text as tokens and chunks, and perplexity by token."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from text_toys import decoder, save_decoder, save_tokenizer, words

from hub_mpq import HubMPQ
from hub_mpq.data import text_loader, text_tokens
from hub_mpq.data.text import read_text
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.train.perplexity import Windows, perplexity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def mpq(folder):
    return HubMPQ.from_pretrained(folder, weight_only=True)


def tokens(count, seed=0):
    return torch.randint(3, 43, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_hand(model, ids, context, stride):
    """The mean of −log p by the loop of transformers' guide, one token at a time, in float64."""
    logp = {}
    ended = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        found = model(ids[None, begin:end]).logits[0].double().log_softmax(-1)
        for at in range(max(ended, begin + 1), end):
            assert at not in logp
            logp[at] = -float(found[at - begin - 1, ids[at]])
        ended = end
        if end == len(ids):
            break
    return sum(logp.values()) / len(logp), len(logp)


@pytest.mark.parametrize(
    ("count", "context", "stride"),
    [(200, 32, 32), (200, 32, 8), (200, 32, 31), (193, 64, 64), (40, 64, 64), (64, 64, 1), (65, 64, 64), (65, 64, 63)],
)
def test_perplexity_scores_each_token_once_as_transformers_guide_does(count, context, stride):
    model, ids = decoder(), tokens(count)
    loss, scored = by_hand(model, ids, context, stride)
    found = perplexity(model, ids, context=context, stride=stride)
    assert found["tokens"] == scored
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert (found["context"], found["stride"], found["task"]) == (context, stride, "causal-lm")


def test_a_smaller_stride_gives_every_token_more_before_it():
    lengths = {stride: [] for stride in (8, 32)}
    for stride, found in lengths.items():
        for window in Windows(torch.arange(3, 203), 32, stride):
            places = (window["labels"][0] != -100).nonzero().flatten()
            found += [int(at) for at in places if at]
    assert min(lengths[8][32:]) >= 24
    assert min(lengths[32]) == 1


def test_the_defaults_are_those_of_the_model():
    found = perplexity(decoder(), tokens(150))
    assert (found["context"], found["stride"]) == (64, 64)
    long = perplexity(decoder(max_position_embeddings=4096), tokens(1500))
    assert (long["context"], long["tokens"]) == (1024, 1498)


def test_no_more_than_one_window_of_logits_is_held(monkeypatch):
    model, sizes = decoder(), []
    model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(tuple(out.shape)))
    perplexity(model, tokens(300), context=32)
    assert set(sizes) == {(1, 32, 48), (1, 12, 48)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 65}, "from 2 to 64 tokens"),
        ({"context": 1}, "from 2 to 64 tokens"),
        ({"context": 32, "stride": 33}, "from 1 to 32 tokens"),
        ({"stride": 0}, "from 1 to 64 tokens"),
        ({"ids": [5]}, "at least two integer token ids, got 1"),
        ({"ids": [0.5, 1.0]}, "at least two integer token ids"),
    ],
)
def test_lengths_out_of_range_are_named(changes, words):
    ids = changes.pop("ids", tokens(100))
    with pytest.raises(InvalidArgument, match=words):
        perplexity(decoder(), ids, **changes)


@pytest.mark.parametrize("ids", [["a", "b"], [0.5, 1.0], [True, False], [3, -1], [3, 10**6], [[1, 2], [3]]])
def test_what_are_no_token_ids_of_the_model_is_named(ids):
    with pytest.raises(InvalidArgument, match="token ids"):
        perplexity(decoder(), ids)


def test_perplexity_is_of_causal_language_models():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(InvalidArgument, match="needs a causal language model, got BertForMaskedLM"):
        perplexity(transformers.BertForMaskedLM(config), tokens(100))


def test_bfloat16_is_measured_in_float32():
    model, ids = decoder().to(torch.bfloat16), tokens(100)
    with torch.no_grad():
        logits = model(ids[None, :64]).logits[0].float()
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:64])
    assert perplexity(model, ids[:64])["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_a_text_is_cut_by_the_models_own_tokenizer(mpq, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(words(300))
    ids = text_tokens(file, mpq.source, mpq.model)
    assert ids.tolist() == [3 + int(word[1:]) for word in words(300).split()]
    found = mpq.perplexity(str(file), context=32, stride=16)
    assert found == mpq.perplexity(ids, context=32, stride=16) == mpq.metrics["float"]
    assert found["tokens"] == 299


def test_chunks_are_read_again_in_an_order_of_the_seed():
    ids = tokens(1000)
    loader = text_loader(ids, length=64, seed=3)
    first = [batch["input_ids"] for batch in loader]
    assert len(first) == len(loader) == 15
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(first, loader, strict=True))
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in loader)
    rows = {tuple(row.tolist()) for row in torch.cat(first)}
    assert rows == {tuple(row.tolist()) for row in ids[:960].view(15, 64)}
    other = [batch["input_ids"] for batch in text_loader(ids, length=64, seed=4)]
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    in_order = torch.cat([batch["input_ids"] for batch in text_loader(ids, length=64, train=False, batch_size=4)])
    assert torch.equal(in_order.flatten(), ids[:960])
    with pytest.raises(InvalidArgument, match="37 tokens, fewer than one chunk of 64"):
        text_loader(ids[:37], length=64)


def test_rows_of_data_sets_are_joined_by_blank_lines(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": ["w1 w2", "", "w3"], "title": ["a", "b", "c"], "n": [1, 2, 3]})
    (tmp_path / "rows").mkdir()
    rows.to_parquet(tmp_path / "rows" / "train.parquet")
    rows.to_json(tmp_path / "rows.jsonl")
    for data in (tmp_path / "rows", tmp_path / "rows" / "train.parquet", tmp_path / "rows.jsonl"):
        assert read_text(data) == "w1 w2\n\nw3"
    assert read_text(f"hfds/{tmp_path / 'rows'}:train[2:]") == "w3"
    with pytest.raises(InvalidArgument, match=r"cannot read .*rows:test"):
        read_text(f"hfds/{tmp_path / 'rows'}:test")
    rows.remove_columns("text").to_parquet(tmp_path / "title.parquet")
    assert read_text(tmp_path / "title.parquet") == "a\n\nb\n\nc"
    rows.rename_column("text", "body").to_parquet(tmp_path / "two.parquet")
    with pytest.raises(InvalidArgument, match=r"column 'text' not found .*; its columns are body, title, n"):
        read_text(tmp_path / "two.parquet")


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    for name, said in (("empty.txt", "contains no text"), ("binary.txt", "binary.txt as text"), ("none", "cannot")):
        with pytest.raises(InvalidArgument, match=said):
            read_text(tmp_path / name)
    with pytest.raises(InvalidArgument, match="file not found"):
        read_text(tmp_path / "none.parquet")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_without_a_tokenizer_says_so(kind, tmp_path):
    """Without its files GPT-2's tokenizer is one that knows no word."""
    if kind == "llama":
        decoder().save_pretrained(tmp_path / "model")
    else:
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=48, bos_token_id=1, eos_token_id=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    mpq = HubMPQ.from_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(words(100))
    with pytest.raises(HubMPQError, match="tokenizer not found"):
        mpq.perplexity(tmp_path / "text.txt")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    mpq = HubMPQ.from_pretrained(save_decoder(tmp_path / "model", vocab_size=20))
    (tmp_path / "text.txt").write_text(words(100))
    with pytest.raises(HubMPQError, match="but the model has only 20 embeddings"):
        mpq.perplexity(tmp_path / "text.txt")


def test_a_packed_folder_keeps_its_tokenizer(mpq, folder, tmp_path):
    (tmp_path / "text.txt").write_text(words(200))
    own = HubMPQ.from_pretrained(folder, weight_only=True)
    own.apply_policy("W4A32")
    figures = own.perplexity(tmp_path / "text.txt", context=32)
    assert own.metrics["quantized"] == figures
    own.save_pretrained(tmp_path / "packed")
    again = HubMPQ.from_pretrained(tmp_path / "packed")
    assert again.perplexity(tmp_path / "text.txt", context=32) == figures


def test_perplexity_of_other_tasks_text_is_refused(tmp_path):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=48
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    mpq = HubMPQ.from_pretrained(save_tokenizer(tmp_path / "bert"))
    (tmp_path / "text.txt").write_text(words(100))
    with pytest.raises(InvalidArgument, match="require a causal language model, got BertForMaskedLM"):
        mpq.perplexity(tmp_path / "text.txt")


def test_token_ids_of_any_whole_type():
    ids = torch.arange(20) % 7
    found = {perplexity(decoder(), given)["perplexity"] for given in (ids, ids.int(), ids.numpy().astype("uint16"))}
    assert len(found) == 1
