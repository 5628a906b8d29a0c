"""Composite models, codecs, speech and video run whole on the example that is made of their config."""

import warnings

import pytest
import torch
import transformers as T
from huggingface_hub.utils import validate_repo_id
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hub_mpq import HubMPQ
from hub_mpq.adapters import load
from hub_mpq.adapters.example_inputs import example_for
from hub_mpq.errors import HubMPQError, InvalidArgument

TEXT = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 40,
}
ENCODER = {**WHISPER, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 200}


def text(model_type="llama", **more):
    return {"model_type": model_type, **TEXT, **more}


FORMS = {
    "LlavaForConditionalGeneration": (
        T.LlavaConfig,
        {"vision_config": {"model_type": "clip_vision_model", **VISION}, "text_config": text(), "image_token_id": 199},
        {"input_ids": (48,), "pixel_values": (3, 56, 56)},
        "vision_tower",
    ),
    "Gemma3ForConditionalGeneration": (
        T.Gemma3Config,
        {
            "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
            "text_config": text("gemma3_text"),
            "mm_tokens_per_image": 4,
            "image_token_index": 199,
        },
        {"input_ids": (48,), "pixel_values": (3, 56, 56)},
        "vision_tower",
    ),
    "Idefics3ForConditionalGeneration": (
        T.Idefics3Config,
        {"vision_config": VISION, "text_config": text(), "image_token_id": 199, "pad_token_id": 0},
        {"input_ids": (48,), "pixel_values": (1, 3, 56, 56)},
        "vision_model",
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        T.Qwen2_5_VLConfig,
        {
            "vision_config": {
                "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2,
                "fullatt_block_indexes": [1],
            },
            "text_config": text(
                "qwen2_5_vl_text", rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}
            ),
            "image_token_id": 199,
            "video_token_id": 198,
            "vision_start_token_id": 197,
            "vision_end_token_id": 196,
        },
        {"input_ids": (192,), "pixel_values": (1176,), "image_grid_thw": (3,)},
        "visual",
    ),
    "MllamaForConditionalGeneration": (
        T.MllamaConfig,
        {
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
                "attention_heads": 2, "image_size": 56, "vision_output_dim": 64, "intermediate_layers_indices": [1],
                "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 2,
            },
            "text_config": {**TEXT, "num_hidden_layers": 2, "cross_attention_layers": [1], "pad_token_id": 0},
            "image_token_index": 199,
        },
        {"input_ids": (48,), "pixel_values": (1, 2, 3, 56, 56)},
        "vision_model",
    ),
    "BlipForConditionalGeneration": (
        T.BlipConfig,
        {"vision_config": VISION, "text_config": {**TEXT, "bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}},
        {"input_ids": (48,), "pixel_values": (3, 56, 56)},
        "vision_model",
    ),
    "Qwen2AudioForConditionalGeneration": (
        T.Qwen2AudioConfig,
        {"audio_config": WHISPER, "text_config": text("qwen2"), "audio_token_index": 199},
        {"input_ids": (48,), "input_features": (16, 80), "feature_attention_mask": (80,)},
        "audio_tower",
    ),
    "VoxtralForConditionalGeneration": (
        T.VoxtralConfig,
        {
            "audio_config": {
                "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_mel_bins": 16, "max_source_positions": 40,
            },
            "text_config": text(),
            "audio_token_id": 199,
        },
        {"input_ids": (48,), "input_features": (16, 80)},
        "audio_tower",
    ),
    "MimiModel": (
        T.MimiConfig,
        {
            "hidden_size": 32, "num_filters": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "codebook_size": 16, "codebook_dim": 8,
            "vector_quantization_hidden_dimension": 8, "num_quantizers": 2, "upsample_groups": 32,
        },
        {"input_values": (1, 16000)},
        "encoder",
    ),
    "EncodecModel": (
        T.EncodecConfig,
        {"hidden_size": 16, "num_filters": 4, "codebook_size": 16, "codebook_dim": 16, "num_lstm_layers": 1},
        {"input_values": (1, 16000)},
        "encoder",
    ),
    "DacModel": (
        T.DacConfig,
        {"encoder_hidden_size": 8, "decoder_hidden_size": 32, "n_codebooks": 2, "codebook_size": 16},
        {"input_values": (1, 16000)},
        "encoder",
    ),
    "Siglip2ForImageClassification": (
        T.Siglip2Config,
        {"vision_config": {**VISION, "num_patches": 16}, "text_config": TEXT},
        {"pixel_values": (16, 588), "pixel_attention_mask": (16,), "spatial_shapes": (2,)},
        "vision_model",
    ),
    "ASTForAudioClassification": (
        T.ASTConfig,
        {**TEXT, "max_length": 100, "num_mel_bins": 32},
        {"input_values": (100, 32)},
        "audio_spectrogram_transformer",
    ),
    "ClapModel": (
        T.ClapConfig,
        {
            "text_config": {**TEXT, "projection_dim": 16},
            "audio_config": {
                "spec_size": 64, "num_mel_bins": 16, "hidden_size": 32, "patch_embeds_hidden_size": 8, "depths": [1, 1],
                "num_attention_heads": [1, 2], "window_size": 4, "num_classes": 4, "projection_hidden_size": 16,
                "hidden_size_out": 16,
            } | {"hidden_size": 16},
            "projection_dim": 16,
        },
        {"input_ids": (48,), "input_features": (1, 256, 16)},
        "audio_model",
    ),
    "DiaForConditionalGeneration": (
        T.DiaConfig,
        {
            "encoder_config": TEXT,
            "decoder_config": {
                **TEXT, "vocab_size": 64, "num_channels": 3, "cross_hidden_size": 32, "cross_num_attention_heads": 2,
                "cross_num_key_value_heads": 2, "cross_head_dim": 16,
            },
            "delay_pattern": [0, 1, 2], "pad_token_id": 61, "eos_token_id": 60, "bos_token_id": 62,
        },
        {"input_ids": (48,), "decoder_input_ids": (48, 3)},
        "model.decoder",
    ),
    "Speech2TextForConditionalGeneration": (
        T.Speech2TextConfig,
        {**ENCODER, "input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 40},
        {"input_features": (80, 16), "decoder_input_ids": (48,)},
        "model.encoder",
    ),
    "SpeechT5ForSpeechToText": (
        T.SpeechT5Config,
        {
            **{k: v for k, v in ENCODER.items() if k not in ("d_model", "num_mel_bins", "max_source_positions")},
            "hidden_size": 32, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [40, 8],
            "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "speech_decoder_prenet_units": 16,
        },
        {"input_values": (16000,), "decoder_input_ids": (48,)},
        "speecht5.encoder",
    ),
    "VideoMAEForVideoClassification": (
        T.VideoMAEConfig,
        {**VISION, "num_frames": 4},
        {"pixel_values": (4, 3, 56, 56)},
        "videomae",
    ),
}  # fmt: skip


def model_of(name):
    make, values, _, _ = FORMS[name]
    torch.manual_seed(0)
    return getattr(T, name)._from_config(make(**values), dtype=torch.float32).eval()


def folder_of(name, root):
    model_of(name).save_pretrained(root / "float")
    return str(root / "float")


@pytest.mark.parametrize("name", FORMS)
def test_every_tower_runs_and_is_counted(name, tmp_path):
    _, _, shapes, tower = FORMS[name]
    source = load(folder_of(name, tmp_path), sequence_length=48)
    assert {k: tuple(source.example[k].shape[1:]) for k in shapes} == shapes
    share, missed = source.graph.not_run()
    assert share < 0.05, missed
    inside = [x for x in (*source.graph, *source.graph.floats) if f".{tower}." in f".{x.name}." and x.macs]
    assert inside
    with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter, torch.no_grad():
        source.model(**source.example)
    counted = sum(layer.macs for layer in source.graph) + sum(op.macs for op in source.graph.floats)
    if name not in ("EncodecModel", "MimiModel"):  # torch counts no recurrent layer and no table of distances
        assert 2 * counted == counter.get_total_flops()
    on_meta = load(str(tmp_path / "float"), meta=True, sequence_length=48)
    assert on_meta.graph.digest == source.graph.digest


def outputs(model, example):
    torch.manual_seed(0)
    with torch.no_grad():
        return [x for x in tree_leaves(dict(model(**example).items())) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "VoxtralForConditionalGeneration", "MimiModel"])
def test_quantized_saved_and_loaded_to_the_bit(name, tmp_path):
    mpq = HubMPQ.from_pretrained(folder_of(name, tmp_path), sequence_length=48)
    mpq.apply_policy("W4A8")
    tower = FORMS[name][3]
    assert any(f".{tower}." in f".{layer}." for layer in mpq.policy.bits)
    before = outputs(mpq.model, mpq.source.example)
    mpq.save_pretrained(tmp_path / "packed")
    loaded = HubMPQ.from_pretrained(tmp_path / "packed")
    assert {k: v.shape for k, v in loaded.source.example.items()} == {k: v.shape for k, v in mpq.source.example.items()}
    for model in (loaded.model, getattr(T, name).from_pretrained(tmp_path / "packed")):
        after = outputs(model.eval(), mpq.source.example)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_tokens_beside_an_image():
    model = model_of("LlavaForConditionalGeneration")
    for asked, given in ((48, 48), (17, 144), (16, 144), (8, 144), (144, 144)):
        ids = example_for(model, asked)["input_ids"]
        assert ids.shape == (1, given)
        assert (ids == 199).sum() == 16  # 4 × 4 patches
        assert ids.max() < 200


def test_a_model_that_is_given_text_alone_warns():
    model = model_of("LlavaForConditionalGeneration")
    ids = torch.arange(16).unsqueeze(0)
    with pytest.warns(UserWarning, match=r"% of the weights were not used by .*: model\.vision_tower") as told:
        mpq = HubMPQ.from_module(model, {"input_ids": ids})
    assert len(told) == 1
    assert "warning: " in mpq.report()
    assert str(told[0].message) in mpq.report()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mpq = HubMPQ.from_module(model, example_for(model))
    assert "were not used by the example input" not in mpq.report()


def test_an_input_that_is_not_known_is_one_sentence():
    model = T.PatchTSTModel(T.PatchTSTConfig(num_hidden_layers=1, d_model=16, ffn_dim=16, num_attention_heads=2))
    with pytest.raises(
        InvalidArgument, match="cannot build an example input for PatchTSTModel: unsupported main input 'past_v"
    ):
        example_for(model)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The Hub can't be reached; the client's download, which tries again, must not be asked."""

    error = type("ConnectError", (Exception,), {"__module__": "httpx._exceptions"})

    def unreachable(*args, **kwargs):
        raise error("Name or service not known")

    def download(repo_id, *args, **kwargs):
        validate_repo_id(repo_id)
        raise AssertionError("the client's download was asked")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnt18", "resnet18"),
        ("timm/resnt18", "resnet18"),
        ("hf-hub:timm/resnt18.a1_in1k", "resnet18"),
        ("robertta-base", "FacebookAI/roberta-base"),
        ("google-bert/bert-base-uncasedd", "google-bert/bert-base-uncased"),
    ],
)
def test_a_mistyped_name_is_told_at_once(no_network, name, near):
    with pytest.raises(HubMPQError, match=rf"cannot download .*; check the name .did you mean {near}.* and the net"):
        HubMPQ.from_pretrained(name)


@pytest.mark.parametrize("name", ["nobody/has-this-at-all", "hf-hub:nobody/has-this-at-all"])
def test_a_name_like_no_other_is_told_at_once(no_network, name):
    with pytest.raises(HubMPQError, match=r"cannot download .*; check the name and the network"):
        HubMPQ.from_pretrained(name)


@pytest.mark.parametrize(
    "name", ["./nowhere", "../no-where", "/nonexistent", "~/nope", "local-dir:nowhere", "no where", "a/b/c", "hf-hub:"]
)
def test_a_path_is_no_repository(no_network, name):
    with pytest.raises(InvalidArgument, match="no such folder"):
        HubMPQ.from_pretrained(name)


def test_ids_are_of_the_vocabulary_that_reads_them():
    """Dia's text has 256 words, its sound 1,028, and an end that only the sound has."""
    with torch.device("meta"):
        model = T.DiaForConditionalGeneration(T.DiaConfig()).eval()
    example = example_for(model, 16)
    assert example["input_ids"].max() < model.config.encoder_config.vocab_size
    assert example["decoder_input_ids"].max() < model.config.decoder_config.vocab_size
