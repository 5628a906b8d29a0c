"""Models of sound, text and images with 1-d and transposed convolutions, and weights that are computed at each call,
through every way that a packed model goes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hub_mpq import HubMPQ
from hub_mpq.adapters import load
from hub_mpq.core.files import PACKED
from hub_mpq.core.library import libraries
from hub_mpq.errors import HubMPQError
from hub_mpq.export.float_copy import float_copy_state
from hub_mpq.nn.fold import folded_layers
from hub_mpq.nn.packing import predicted_nbytes

_SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
_SOUND = {
    **{"conv_dim": (8, 8), "conv_stride": (20, 16), "conv_kernel": (20, 16), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_length": 2},
}
_BOTH = {
    **{"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "squeezebert": ("SqueezeBertForSequenceClassification", {**_SIZES, "embedding_size": 16, "num_hidden_layers": 1}),
    "wav2vec2": ("Wav2Vec2ForCTC", {**_SIZES, **_SOUND, "num_hidden_layers": 1}),
    "wavlm": ("WavLMForCTC", {**_SIZES, **_SOUND, "num_hidden_layers": 1}),
    "hubert": ("HubertForCTC", {**_SIZES, **_SOUND, "num_hidden_layers": 1}),
    "speecht5": ("SpeechT5ForSpeechToText", {**_SIZES, **_SOUND, **_BOTH}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_BOTH, **_TOKENS, "d_model": 16, "vocab_size": 40, "max_source_positions": 10, "num_mel_bins": 4},
    ),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4},
    ),
    "bit": (
        "BitForImageClassification",
        {
            **{"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4, "num_labels": 3},
            **{"global_padding": "same", "image_size": 32},
        },
    ),
}
KINDS = {
    "squeezebert": {"linear", "embedding", "convolution1d"},
    "wav2vec2": {"linear", "convolution1d"},
    "wavlm": {"linear", "embedding", "convolution1d", "projection"},
    "hubert": {"linear", "convolution1d"},
    "speecht5": {"linear", "embedding", "convolution1d"},
    "whisper": {"linear", "embedding", "convolution1d"},
    "mamba": {"linear", "embedding"},  # its convolution is read, not called
    "bit": {"linear", "conv2d"},
}
FOLDED = dict.fromkeys(("wav2vec2", "wavlm", "hubert", "speecht5"), "weight_norm")
FOLDED["bit"] = "WeightStandardizedConv2d"


@dataclass
class Family:
    """A float model and its folder, a packed one, and the HubMPQ it was made by."""

    kind: str
    plain: Any
    float_folder: Path
    folder: Path
    mpq: HubMPQ
    size: int

    @torch.no_grad()
    def logits(self, model: Any = None) -> torch.Tensor:
        out = (model or self.mpq.model).eval()(**self.mpq.source.example)
        return out.logits


@pytest.fixture(scope="module", params=MODELS)
def family(request: Any, tmp_path_factory: Any) -> Family:
    root, (name, values) = tmp_path_factory.mktemp(request.param), MODELS[request.param]
    cls = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = cls(cls.config_class(**values)).eval()
    plain.save_pretrained(root / "float")
    mpq = HubMPQ.from_pretrained(root / "float")
    mpq.apply_policy("W5A8", [mpq.source.example])
    return Family(request.param, plain, root / "float", root / "packed", mpq, mpq.save_pretrained(root / "packed"))


def test_the_float_function_stays_and_all_layers_are_quantized(family):
    graph = family.mpq.graph
    assert {layer.kind for layer in graph} == KINDS[family.kind]
    torch.testing.assert_close(family.logits(family.mpq.float_model), family.logits(family.plain), rtol=1e-5, atol=1e-6)
    kept = {op.kind for op in graph.floats if op.weight_count and not op.kind.endswith("PositionalEmbedding")}
    assert kept == ({"Conv1d", "Linear"} if family.kind == "mamba" else set())  # read, not called


def test_all_ways_of_loading_give_the_same_logits(family):
    wanted = family.logits()
    assert torch.equal(family.logits(HubMPQ.from_pretrained(family.folder).model), wanted)
    assert torch.equal(family.logits(HubMPQ.from_pretrained(family.folder, resident="packed").model), wanted)
    model, info = type(family.plain).from_pretrained(family.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(family.logits(model), wanted)
    assert not torch.equal(wanted, family.logits(family.plain))


def test_the_size_is_known_to_the_byte(family):
    mpq = family.mpq
    assert family.size == (family.folder / PACKED).stat().st_size
    assert predicted_nbytes(mpq.float_model, mpq._manifest(mpq.policy)) == family.size


def test_a_float_copy_is_one_of_plain_transformers(family, tmp_path):
    state = None
    for model in (family.mpq.model, type(family.plain).from_pretrained(family.folder)):
        if family.kind == "bit":
            with pytest.raises(HubMPQError, match="WeightStandardizedConv2d"):
                float_copy_state(model, libraries.get("transformers"))
            continue
        state = float_copy_state(model, libraries.get("transformers"))
        own = load_file(family.float_folder / "model.safetensors")
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((family.float_folder / "config.json").read_text())
        plain, info = type(family.plain).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        dequantized = type(family.plain).from_pretrained(family.folder)
        dequantized.dequantize()
        wanted = family.logits(dequantized)
        torch.testing.assert_close(family.logits(plain), wanted, rtol=1e-5, atol=1e-5)


def test_dequantize_gives_a_model_of_the_same_function(family, tmp_path):
    model = type(family.plain).from_pretrained(family.folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.dequantize()
    told = [str(w.message) for w in told if "do not load this state dict" in str(w.message)]
    assert len(told) == (family.kind == "bit")
    if family.kind == "bit":
        return
    assert set(model.state_dict()) == set(family.plain.state_dict())
    model.save_pretrained(tmp_path)
    again = type(family.plain).from_pretrained(tmp_path)
    torch.testing.assert_close(family.logits(again), family.logits(model), rtol=1e-5, atol=1e-6)


def test_quantized_while_it_is_loaded(family):
    from hub_mpq.hub.plugin import MPQConfig

    config = MPQConfig(policy="W5A8", calibration=[dict(family.mpq.source.example)])
    model = type(family.plain).from_pretrained(family.float_folder, quantization_config=config)
    torch.testing.assert_close(family.logits(model), family.logits(), rtol=1e-5, atol=1e-5)


def test_weights_of_normed_layers_are_folded_and_trained(family):
    model = HubMPQ.from_pretrained(family.folder).model
    folded = {what.form for _, _, what in folded_layers(model)}
    assert folded == ({FOLDED[family.kind]} if family.kind in FOLDED else set())
    model.eval()(**family.mpq.source.example).logits.square().sum().backward()
    for name, layer, _ in folded_layers(model):
        assert layer.weight.grad is not None, name
        assert layer.weight.grad.abs().sum() > 0, name


def test_a_layer_that_is_left_float_is_folded_all_the_same(family, tmp_path):
    found = [name for name, _, _ in folded_layers(family.mpq.float_model)]
    if not found:
        pytest.skip("nothing is folded")
    mpq = HubMPQ.from_pretrained(family.float_folder, exclude=[found[-1]])
    assert found[-1] not in mpq.graph.names
    mpq.apply_policy("W5A8", [mpq.source.example])
    mpq.save_pretrained(tmp_path)
    wanted = family.logits(mpq.model)
    assert torch.equal(family.logits(HubMPQ.from_pretrained(tmp_path).model), wanted)
    assert torch.equal(family.logits(type(family.plain).from_pretrained(tmp_path)), wanted)


_SMALL = {"depths": (1, 1, 1, 1), "group_size": 8}
TIMM: dict[str, dict[str, Any]] = {
    "nfnet_l0": {**_SMALL, "channels": (16, 32, 32, 32), "stem_chs": 16},
    "dm_nfnet_f0": {**_SMALL, "channels": (16, 32, 32, 32), "stem_chs": 16},
    "nf_regnet_b0": {**_SMALL, "channels": (16, 16, 32, 32)},
    "resnetv2_50x1_bit": {"channels": (128, 128, 128, 128), "stem_chs": 32},
    "vit_tiny_r_s16_p8_224": {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2},
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_standardised_convolutions(name, tmp_path):
    import timm

    side = 32 if name.startswith("vit") else 64
    timm_args = {"pretrained": False, "num_classes": 5, **TIMM[name]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mpq = HubMPQ.from_pretrained(name, input_size=(3, side, side), **timm_args)
        torch.manual_seed(0)
        plain = timm.create_model(name, **timm_args).eval()
        x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(mpq.model(x), plain(x), rtol=1e-5, atol=1e-6)
        mpq.apply_policy("W5A8", [(x,)])
        size, wanted = mpq.save_pretrained(tmp_path), mpq.model(x)
        assert predicted_nbytes(mpq.float_model, mpq._manifest(mpq.policy)) == size
        assert torch.equal(HubMPQ.from_pretrained(tmp_path).model(x), wanted)
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(wrapped(x).logits, wanted)
    with pytest.raises(HubMPQError, match="so the quantized weights cannot be written as float weights"):
        float_copy_state(mpq.model, libraries.get("timm"))


@pytest.mark.parametrize("name", ["nfnet_l0", "nf_regnet_b0", "resnetv2_50x1_bit", "vit_small_r26_s32_224"])
def test_at_least_95_percent_of_timms_products_are_quantized(name):
    graph = load(name, meta=True).graph
    macs = sum(layer.macs for layer in graph)
    assert macs >= 0.95 * (macs + sum(op.macs for op in graph.floats))
