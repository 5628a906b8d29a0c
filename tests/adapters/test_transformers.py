"""transformers models from configs, against closed forms."""

import json
import time
from pathlib import Path

import pytest
import torch
import transformers as T
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hub_mpq import HubMPQ
from hub_mpq.adapters import build_graph, load
from hub_mpq.cli import app
from hub_mpq.core import LayerBits
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.nn.experts import conceal_experts

EMBEDDING, EDGE = LayerBits(8, 32), LayerBits(8, 8)


def macs(graph):
    return sum(layer.macs for layer in graph), sum(op.macs for op in graph.floats)


def fixed(graph):
    return {layer.name: layer.fixed for layer in graph if layer.fixed}


def test_bert_base(folder):
    source = load(folder(T.BertConfig(), "BertModel"), meta=True, sequence_length=200)
    length, width = 200, 768
    layer = length * (4 * width * width + 2 * width * 3072)
    assert macs(source.graph) == (12 * layer + width * width, 12 * 2 * length * length * width)
    assert {op.kind for op in source.graph.floats} == {"attention"}
    assert set(fixed(source.graph).values()) == {EMBEDDING}  # a bare encoder has no head
    assert len(fixed(source.graph)) == 3
    attention = [n for n in source.graph.names if n.startswith("encoder.layer.3.attention.self.")]
    assert len(attention) == 3
    assert len({source.graph[n].activation_tie for n in attention} - {None}) == 1
    assert source.example["input_ids"].is_meta
    assert source.preprocess["sequence_length"] == 200
    assert source.graph.input_shape == (200,)


def test_gpt2_and_its_transposed_linears(folder):
    source = load(folder(T.GPT2Config(), "GPT2LMHeadModel"), meta=True)
    graph, length, width = source.graph, 128, 768
    first = graph["transformer.h.0.attn.c_attn"]
    assert (first.kind, first.weight_shape, first.macs) == ("conv1d", (width, 3 * width), 3 * length * width * width)
    assert macs(graph) == (12 * 12 * length * width**2 + length * width * 50257, 12 * 2 * length**2 * width)
    assert graph["lm_head"].weight_owner == "transformer.wte"
    assert graph["lm_head"].tie == graph["transformer.wte"].tie
    assert fixed(graph) == {"transformer.wte": EMBEDDING, "transformer.wpe": EMBEDDING, "lm_head": EDGE}


def test_seven_billion_parameters_take_no_memory(folder):
    path = folder(T.LlamaConfig(), "LlamaForCausalLM")
    start = time.process_time()
    source = load(path, meta=True)
    assert time.process_time() - start < 20  # seconds of work, whatever else the machine does; 0.5 when idle
    graph, length, width = source.graph, 128, 4096
    assert all(p.is_meta for p in source.model.parameters())
    assert sum(layer.weight_count for layer in graph) > 6.7e9
    block = length * (4 * width * width + 3 * width * 11008)
    assert macs(graph)[0] == 32 * block + length * width * 32000
    attention = sum(op.macs for op in graph.floats if op.kind == "attention")
    assert attention == 32 * 2 * length * length * width
    # the angles of the rotary embedding are a product in some releases of transformers: 64 frequencies by 128 places
    others = {op.name: op.macs for op in graph.floats if op.kind != "attention"}
    assert others in ({}, {"model.rotary_emb": 64 * length})
    mlp = [graph[f"model.layers.5.mlp.{n}_proj"].activation_tie for n in ("gate", "up", "down")]
    assert mlp[0] == mlp[1] is not None
    assert mlp[2] is None
    assert fixed(graph) == {"model.embed_tokens": EMBEDDING, "lm_head": EDGE}


def test_vit(folder):
    graph = load(folder(T.ViTConfig(num_hidden_layers=2), "ViTForImageClassification"), meta=True).graph
    tokens, width = 197, 768
    modules = 2 * tokens * 12 * width * width + 196 * width * width + 2 * width
    assert macs(graph) == (modules, 2 * 2 * tokens * tokens * width)
    assert list(fixed(graph).values()) == [EDGE, EDGE]
    assert fixed(graph).keys() == {"vit.embeddings.patch_embeddings.projection", "classifier"}
    assert graph.input_shape == (3, 224, 224)


SMALL = {
    "BertForSequenceClassification": (T.BertConfig(num_hidden_layers=1), ["classifier"]),
    "RobertaForSequenceClassification": (T.RobertaConfig(num_hidden_layers=1), ["classifier.out_proj"]),
    "DistilBertForSequenceClassification": (T.DistilBertConfig(n_layers=1), ["classifier"]),
    "BertForMaskedLM": (T.BertConfig(num_hidden_layers=1), ["cls.predictions.decoder"]),
    "DebertaV2Model": (T.DebertaV2Config(num_hidden_layers=1), []),
    "AlbertModel": (T.AlbertConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96), []),
    "T5ForConditionalGeneration": (T.T5Config(num_layers=1), ["lm_head"]),
    "BartForSequenceClassification": (
        T.BartConfig(encoder_layers=1, decoder_layers=1),
        ["classification_head.out_proj"],
    ),
    "OPTForCausalLM": (T.OPTConfig(num_hidden_layers=1), ["lm_head"]),
    "Qwen2ForCausalLM": (T.Qwen2Config(num_hidden_layers=1), ["lm_head"]),
    "MixtralForCausalLM": (T.MixtralConfig(num_hidden_layers=1), ["lm_head"]),
    "CLIPModel": (T.CLIPConfig(), []),
    "SwinForImageClassification": (T.SwinConfig(depths=[1, 1], num_heads=[2, 4]), ["classifier"]),
    "ConvNextForImageClassification": (T.ConvNextConfig(), ["classifier"]),
    "DeiTForImageClassificationWithTeacher": (
        T.DeiTConfig(num_hidden_layers=1),
        ["cls_classifier", "distillation_classifier"],
    ),
    "WhisperForConditionalGeneration": (T.WhisperConfig(encoder_layers=1, decoder_layers=1), ["proj_out"]),
}


@pytest.mark.parametrize("architecture", SMALL)
def test_families_are_traced_without_weights(folder, architecture):
    config, heads = SMALL[architecture]
    source = load(folder(config, architecture), meta=True)
    assert type(source.model).__name__ == architecture
    stems = ("patch", "encoder.conv1")
    edges = [layer.name for layer in source.graph if layer.fixed == EDGE]
    assert [name for name in edges if not any(stem in name for stem in stems)] == heads
    assert all(op.reason for op in source.graph.floats)
    if architecture in ("DebertaV2Model", "BartForSequenceClassification", "MixtralForCausalLM"):
        return  # they look at values, or run operators that torch does not count
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        source.model.eval()(**source.example)
    assert 2 * sum(macs(source.graph)) == counter.get_total_flops()


def test_a_parameter_that_only_lends_itself_is_replaced_too(folder):
    graph = load(folder(T.T5Config(num_layers=1), "T5ForConditionalGeneration"), meta=True).graph
    owners = {layer.name: layer.weight_owner for layer in graph if layer.tie == "encoder.embed_tokens"}
    assert owners == {
        "encoder.embed_tokens": None,
        **dict.fromkeys(["decoder.embed_tokens", "lm_head", "shared"], "encoder.embed_tokens"),
    }
    assert graph["shared"].macs == graph["shared"].activation_count == 0
    assert graph.other_bytes < graph["shared"].weight_count  # no float copy of the vocabulary


class OwnEmbedding(torch.nn.Embedding):
    def forward(self, ids):
        return super().forward(ids)


def test_a_parameter_that_a_float_layer_keeps_is_counted(folder):
    config = T.Gemma2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=1000,
    )  # fmt: skip
    source = load(folder(config, "Gemma2ForCausalLM"), meta=True)
    source.model.model.embed_tokens.__class__ = OwnEmbedding
    graph = build_graph(source.model, source.example, model_id="")
    kept = {op.name: (op.weight_count, op.reason) for op in graph.floats if op.kind != "attention"}
    # the embedding is of a type without a quantized form and reads the float weight: so the head does too
    assert kept["lm_head"] == (64_000, "its weight is used outside its own forward")
    assert kept["model.embed_tokens"][0] == 0  # one Parameter counts once
    assert "lm_head" not in graph.names
    assert graph.other_bytes > 4 * 64_000


TOY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
EXPERTS = {  # {class: (config, layers with experts, how many there are, how many a token runs through, width)}
    "MixtralForCausalLM": (T.MixtralConfig(**TOY, num_local_experts=4), 2, 4, 2, 96),
    "GraniteMoeForCausalLM": (T.GraniteMoeConfig(**TOY, num_local_experts=4), 2, 4, 2, 96),
    "GptOssForCausalLM": (T.GptOssConfig(**TOY, num_local_experts=4, head_dim=16), 2, 4, 4, 96),
    "DeepseekV3ForCausalLM": (
        T.DeepseekV3Config(
            **{**TOY, **LATENT, "num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=8, n_group=2,
            topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
        ), 1, 8, 2, 32,
    ),
    "JambaForCausalLM": (T.JambaConfig(**TOY, num_experts=4, attn_layer_period=2, attn_layer_offset=1), 1, 4, 2, 96),
    "Qwen3MoeForCausalLM": (
        T.Qwen3MoeConfig(**TOY, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16),
        2, 4, 2, 32,
    ),
    "OlmoeForCausalLM": (T.OlmoeConfig(**TOY, num_experts=4, num_experts_per_tok=2), 2, 4, 2, 96),
}  # fmt: skip


class ReadsValues(torch.nn.Module):
    """A forward that looks at values, so that it does not run on meta tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids) if input_ids.sum().item() >= 0 else None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", EXPERTS)
def test_stacks_of_experts_are_layers_and_count(folder, architecture, dtype):
    """From a config alone, on zeros that take no memory, and on the model's own values."""
    config, layers, count, top, width = EXPERTS[architecture]
    config.dtype = dtype
    path = folder(config, architecture)
    skeleton, source = load(path, meta=True), load(path, pretrained=False)
    assert skeleton.model.lm_head.weight.dtype == getattr(torch, dtype)
    ids = source.example["input_ids"]
    graphs = [skeleton.graph, source.graph]
    graphs += [build_graph(ReadsValues(s.model), ids, model_id="", head=()) for s in (skeleton, source)]
    for graph in graphs:
        experts = [layer for layer in graph if layer.kind.startswith("experts")]
        assert len(experts) == 2 * layers
        assert sum(layer.macs for layer in experts) == layers * 128 * top * 3 * 64 * width
        assert sum(layer.weight_count for layer in experts) == layers * count * 3 * 64 * width
        assert not [op for op in graph.floats if "xperts" in op.kind]
        assert macs(graph) == macs(skeleton.graph)


def test_stacks_that_are_no_layers_count_too(folder):
    """As a user's own code may run them, by transformers' grouped products."""
    config, layers, count, top, width = EXPERTS["MixtralForCausalLM"]
    source = load(folder(config, "MixtralForCausalLM"), meta=True)
    conceal_experts(source.model)
    graph = build_graph(source.model, source.example, model_id="")
    experts = [op for op in graph.floats if op.kind == "MixtralExperts"]
    assert sum(op.macs for op in experts) == layers * 128 * top * 3 * 64 * width
    assert sum(op.weight_count for op in experts) == layers * count * 3 * 64 * width
    assert all("3-D" in op.reason for op in experts)
    assert macs(graph)[0] + macs(graph)[1] == sum(macs(source.graph))


def test_experts_from_a_config_on_the_command_line(folder):
    config = EXPERTS["MixtralForCausalLM"][0]
    config.dtype = "float32"
    result = CliRunner().invoke(app, ["inspect", folder(config, "MixtralForCausalLM"), "--json"])
    assert result.exit_code == 0, result.stderr
    rows = {layer["name"]: layer for layer in json.loads(result.stdout)["layers"]}
    assert rows["model.layers.1.mlp.experts.down_proj"]["macs"] == 128 * 2 * 64 * 96


def test_weights_arguments_and_config(folder, tmp_path):
    config = T.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=99
    )
    path = folder(config, "BertModel")
    source = load(path, pretrained=False, num_labels=3, auto_class="AutoModelForSequenceClassification")
    assert source.graph["classifier"].weight_shape == (3, 32)
    assert source.config["architectures"] == ["BertForSequenceClassification"]
    as_wide = load(path, meta=True, num_labels=32, auto_class="AutoModelForSequenceClassification").graph
    assert [name for name, bits in fixed(as_wide).items() if bits == EDGE] == ["classifier"]
    assert json.loads(json.dumps(source.config))["model_type"] == "bert"
    source.model.save_pretrained(tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in source.model.state_dict().items())
    filled = load(str(tmp_path / "saved"), checkpoint_path=tmp_path / "saved" / "model.safetensors")
    assert torch.equal(filled.model.classifier.weight, source.model.classifier.weight)
    with pytest.raises(HubMPQError, match="does not match the model"):
        load(path, checkpoint_path=tmp_path / "saved" / "model.safetensors")
    with pytest.raises(HubMPQError, match=r"cannot read the folder .*; use pretrained=False"):
        load(path)
    with pytest.raises(InvalidArgument, match="unknown argument of BertConfig: colour"):
        load(path, pretrained=False, colour=3)
    with pytest.raises(InvalidArgument, match="unknown transformers class 'AutoNothing'"):
        load(path, pretrained=False, auto_class="AutoNothing")


def test_the_sequence_length_that_a_model_was_given_is_saved(folder, tmp_path):
    config = T.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=99
    )
    mpq = HubMPQ.from_pretrained(folder(config, "BertModel"), pretrained=False, sequence_length=10)
    mpq.apply_policy("W4A8").save_pretrained(tmp_path / "packed")
    again = HubMPQ.from_pretrained(tmp_path / "packed")
    assert again.graph.input_shape == mpq.graph.input_shape == (10,)
    assert again.source.example["input_ids"].shape == (1, 10)
    assert again.source.preprocess["sequence_length"] == 10
    assert again.usage().amounts == mpq.usage().amounts
    longer = HubMPQ.from_pretrained(tmp_path / "packed", sequence_length=12)
    assert longer.source.example["input_ids"].shape == (1, 12)
    assert longer.graph.input_shape == (12,)
    assert sum(x.macs for x in longer.graph) > sum(x.macs for x in again.graph)


@pytest.mark.parametrize(
    ("kept", "saved"),
    [
        ({"size": {"height": 32, "width": 32}}, {"size": {"height": 16, "width": 16}}),
        (
            {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
            {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}},
        ),
        ({"size": 32, "do_rescale": True}, {"size": 16, "do_rescale": True}),
    ],
)
def test_the_image_size_that_a_model_was_given_is_saved(folder, tmp_path, kept, saved):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    path = folder(T.ViTConfig(**small, image_size=32, patch_size=8), "ViTForImageClassification")
    (Path(path) / "preprocessor_config.json").write_text(json.dumps(kept))
    mpq = HubMPQ.from_pretrained(path, pretrained=False, image_size=16).apply_policy("W4A8")
    mpq.save_pretrained(tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "preprocessor_config.json").read_text()) == saved
    again = HubMPQ.from_pretrained(tmp_path / "packed")
    assert again.source.example["pixel_values"].shape == (1, 3, 16, 16)
    assert again.usage().amounts == mpq.usage().amounts
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "preprocessor_config.json").read_bytes() for name in ("packed", "again")]
    assert files[0] == files[1]


def test_a_quantization_config_is_no_part_of_the_skeleton(folder):
    config = T.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    path = folder(config, "BertModel")
    plain = load(path, pretrained=False).graph.digest
    file = Path(path) / "config.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "quantization_config": {"quant_method": "mpq", "format_version": 1}}))
    source = load(path, pretrained=False)
    assert source.graph.digest == plain
    assert "quantization_config" not in source.config


@pytest.mark.parametrize(
    ("model_id", "message"),
    [
        ("", "is empty"),
        ("./nothing/here", "no such folder"),
        ("nobody/nothing", r"cannot download the configuration of 'nobody/nothing'.*network"),
        ("gpt2", "cannot download the configuration of 'gpt2'.*did you mean openai-community/gpt2"),
        ("a/b/c", "no such folder"),
    ],
)
def test_ids_that_name_nothing(model_id, message):
    with pytest.raises(HubMPQError, match=message) as caught:
        load(model_id)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read the config.json"),
        ("[]", "expected timm or transformers"),
        ('{"model_type": "zzz"}', "cannot build"),
        (None, "no config.json"),
    ],
)
def test_folders_that_hold_no_model(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(HubMPQError, match=message):
        load(str(tmp_path))
