"""GGUF: tensors read back equal, names and order of rows right, bytes as predicted, types for llama-quantize."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import transformers

from hub_mpq import HubMPQ, LayerBits, Policy
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.export.gguf import FILE, TENSOR_TYPES
from hub_mpq.export.gguf_types import types_of
from hub_mpq.export.gguf_write import blocks
from hub_mpq.pack import pack_weight

gguf = pytest.importorskip("gguf")
IDS = {"input_ids": torch.arange(24).view(2, 12) * 5 % 64}


def build(folder, kind="llama", **changes):
    """A tiny float model in a folder, with norms and biases that are not ones and zeros."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, **heads}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for value in model.parameters():
            if value.dim() == 1:
                value.data.add_(0.2 * torch.randn_like(value))
        model.save_pretrained(folder)
    return folder


def mixed(mpq, keep):
    """A policy of the target that gives layers its choices in turn, those that `keep` says."""
    menus = {x.name: [b for b in mpq.target.menu(x) if keep(types_of(x)[b])] for x in mpq.graph}
    bits = {x.name: x.fixed or menus[x.name][i % len(menus[x.name])] for i, x in enumerate(mpq.graph)}
    return Policy(bits, mpq.graph.digest)


def quantized(folder, keep, **changes):
    mpq = HubMPQ.from_pretrained(build(folder, **changes), target="gguf")
    return mpq.apply_policy(mixed(mpq, keep), [IDS])


def symmetric(one):
    return one.exact and one.bits.symmetric


@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (5, False), (5, True), (8, False)])
def test_blocks_hold_the_same_weights(bits, zeros):
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    values = torch.randint(-half, half, (6, 96), generator=generator)
    scale = (torch.rand(6, 3, generator=generator) + 0.01).half()
    zero = torch.randint(-half, half, (6, 3), generator=generator) if zeros else None
    packed = pack_weight(values, scale, "linear", bits, zero, 32)
    kind = gguf.GGMLQuantizationType[f"Q{bits}_{int(zeros)}"]
    found = gguf.quants.dequantize(blocks(packed), kind)
    want = packed.dequantize().numpy()
    if zeros:  # the minimum is a float16
        low = (-(zero + half).float() * scale.float()).half().float()
        want = ((values + half).float() * scale.float().repeat_interleave(32, 1) + low.repeat_interleave(32, 1)).numpy()
        assert np.abs(want - packed.dequantize().numpy()).max() <= 2**-11 * (2 * half - 1) * scale.max()
    assert np.array_equal(found, want)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}}),
        ("mistral", {"num_key_value_heads": 1, "sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),  # transformers' reader knows no other
    ],
)
def test_transformers_reads_the_same_model(tmp_path, kind, changes):
    mpq = quantized(tmp_path / "float", symmetric, kind=kind, **changes)
    size = mpq.export(tmp_path / "out", "gguf")
    assert size == (tmp_path / "out" / FILE).stat().st_size == mpq.usage()["GGUF file"]
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    assert reader.get_field("tokenizer.ggml.model").contents() == "none"  # Qwen2's class would make an empty one
    if "rope_parameters" in changes:  # which transformers does not read
        assert reader.get_field("llama.rope.scaling.factor").contents() == 2.0
        return
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=FILE, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(read(**IDS).logits, mpq(**IDS).logits)
        assert not torch.allclose(mpq.float_model(**IDS).logits, mpq(**IDS).logits, rtol=0.01)


def test_the_file_says_which_tensors_have_which_types(tmp_path):
    mpq = quantized(tmp_path / "float", lambda one: one.exact)
    mpq.export(tmp_path / "out", "gguf")
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert set(found.values()) == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F32"}
    assert found["blk.1.attn_norm.weight"] == "F32"
    assert found["token_embd.weight"] == "Q8_0"
    lines = [line.rpartition("=") for line in (tmp_path / "out" / TENSOR_TYPES).read_text().split()]
    for name, kind in found.items():
        if kind != "F32":
            (own,) = [want for pattern, _, want in lines if re.search(pattern, name)]
            assert own == kind.lower()


def test_k_quants_wait_for_llama_quantize(tmp_path):
    mpq = quantized(tmp_path / "float", lambda one: not one.exact or one.bits.weight == 8, intermediate_size=256)
    match = r"2 layers are K-quants.*--tensor-type-file.*to get the final file of ([\d,]+) bytes"
    with pytest.warns(UserWarning, match=match) as told:
        mpq.export(tmp_path / "out", "gguf")
    final = int(re.search(r"([\d,]+) bytes", str(told[0].message))[1].replace(",", ""))
    assert final == mpq.usage()["GGUF file"]
    types = (tmp_path / "out" / TENSOR_TYPES).read_text()
    assert re.search(r"^\^blk\\\.0\\\.ffn_down\\\.weight\$=q\d_k$", types, re.MULTILINE)
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    assert found["blk.0.ffn_down.weight"] == "F16"


def test_other_architectures_have_a_tensor_type_file(tmp_path):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.PhiConfig(**small, vocab_size=64, max_position_embeddings=32)
    transformers.PhiForCausalLM(config).save_pretrained(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float", target="gguf").apply_policy("W4")
    assert "GGUF file" not in mpq.usage().amounts
    with pytest.raises(InvalidArgument, match="limit weight_bits"):
        mpq.check_reachable(size="W4")
    with pytest.warns(UserWarning, match=r"convert_hf_to_gguf.py"):
        mpq.export(tmp_path / "out", "gguf")
    assert r"^blk\.1\.ffn_up\.weight$=q4_0" in (tmp_path / "out" / TENSOR_TYPES).read_text().split()
    assert not (tmp_path / "out" / FILE).exists()


SCALED = {"factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}},
            "rotary embeddings of type 'llama3'",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", **SCALED}}, "rotary embeddings of type 'yarn'"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("mistral", {"sliding_window": 128}, "a sliding window of 128 tokens"),
        (
            "qwen2",
            {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1},
            "a sliding window of 128 tokens",
        ),
    ],
)
def test_models_that_it_does_not_write_have_a_tensor_type_file(tmp_path, kind, changes, said):
    folder = build(tmp_path / "float", kind, max_position_embeddings=512, **changes)
    mpq = HubMPQ.from_pretrained(folder, target="gguf").apply_policy("W4")
    assert "GGUF file" not in mpq.usage().amounts
    with pytest.raises(InvalidArgument, match="limit weight_bits"):
        mpq.check_reachable(size="W4")
    with pytest.warns(UserWarning, match=f"cannot write .*{said} as GGUF"):
        mpq.export(tmp_path / "out", "gguf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [TENSOR_TYPES]
    assert r"^blk\.0\.attn_q\.weight$=q4_0" in (tmp_path / "out" / TENSOR_TYPES).read_text()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_float_experts_are_no_q8_0_in_a_tensor_type_file(tmp_path, kind):
    sizes = {"num_local_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    folder = build(tmp_path / "float", kind, **sizes)
    mpq = HubMPQ.from_pretrained(folder, target="gguf", exclude=["*experts*"]).apply_policy("W4")
    with pytest.warns(UserWarning, match=r"OUT.gguf Q8_0"):
        mpq.export(tmp_path / "out", "gguf")
    lines = (tmp_path / "out" / TENSOR_TYPES).read_text().split()
    assert len(lines) == len(set(lines))
    for block in range(2):
        for part in ("gate", "up", "down"):
            assert rf"^blk\.{block}\.ffn_{part}_exps\.weight$=f16" in lines


def test_what_it_cannot_say_is_refused_in_words(tmp_path, monkeypatch):
    mpq = HubMPQ.from_pretrained(build(tmp_path / "float"), weight_only=True)
    mpq.apply_policy("W4")
    with pytest.raises(HubMPQError, match=r"at W8A32, only for .*W4g32.*target=\"gguf\""):
        mpq.export(tmp_path / "out", "gguf")
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W8g32A8")
    with pytest.raises(HubMPQError, match="supports only weights"):
        mpq.export(tmp_path / "out", "gguf")
    mpq = HubMPQ.from_pretrained(tmp_path / "float", target="gguf").apply_policy("W4")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(HubMPQError, match=r"pip install \"hub-mpq\[gguf\]\""):
        mpq.export(tmp_path / "out", "gguf")
    assert not (tmp_path / "out" / FILE).exists()


def test_the_tokenizer_is_in_the_file(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = build(tmp_path / "float", vocab_size=300)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "the other cat"], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    mpq = HubMPQ.from_pretrained(folder, target="gguf").apply_policy("W4")
    assert mpq.usage()["GGUF file"] == mpq.export(tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    words = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(words) == 300
    assert all(words[i] == word for word, i in fast.get_vocab().items())
    assert reader.get_field("tokenizer.ggml.pre").contents() == "smollm"
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == fast.eos_token_id
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    assert kinds[fast.eos_token_id] == int(gguf.TokenType.CONTROL)
    assert kinds[299] == int(gguf.TokenType.UNUSED)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=FILE)
    assert read("the mat 12")["input_ids"] == fast("the mat 12")["input_ids"]


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> $A </s>", "$A"])
def test_llama_cpp_adds_the_tokens_that_the_tokenizer_adds(tmp_path, template):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    folder = build(tmp_path / "float", vocab_size=258)  # the model has no row for <pad>
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    HubMPQ.from_pretrained(folder, target="gguf").apply_policy("W4").export(tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() == ("<s>" in template)
    assert reader.get_field("tokenizer.ggml.add_eos_token").contents() == ("</s>" in template)
    assert reader.get_field("tokenizer.ggml.tokens").contents()[256:] == ["<s>", "</s>"]
    assert reader.get_field("tokenizer.ggml.padding_token_id") is None


def test_a_packed_model_is_still_for_its_target(tmp_path):
    mpq = quantized(tmp_path / "float", symmetric)
    mpq.export(tmp_path / "out", "gguf")
    assert mpq.save_pretrained(tmp_path / "packed") == mpq.usage()["size"]
    again = HubMPQ.from_pretrained(tmp_path / "packed")
    assert again.target is mpq.target
    assert "made for gguf" in again.report()
    assert again.usage().amounts == mpq.usage().amounts
    again.export(tmp_path / "again", "gguf")
    first, second = (gguf.GGUFReader(tmp_path / name / FILE).tensors for name in ("out", "again"))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(first, second, strict=True))


def test_a_bfloat16_scale_becomes_the_nearest_float16():
    scale = torch.tensor([[0.5, 2.0**-20]], dtype=torch.bfloat16)
    packed = pack_weight(torch.full((1, 64), 3), scale, "linear", 4, None, 32)
    found = gguf.quants.dequantize(blocks(packed), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(found, packed.dequantize().numpy())


def test_a_policy_of_the_target_is_one_of_levels(tmp_path):
    mpq = HubMPQ.from_pretrained(build(tmp_path / "float"), target="gguf").apply_policy("W5", group_size=32)
    searched = {mpq.policy.bits[x.name] for x in mpq.graph.searched}
    assert searched == {LayerBits.parse("W5g32")}
    assert {x.fixed for x in mpq._pinned(None) if x.fixed} == {LayerBits.parse("W8g32")}
