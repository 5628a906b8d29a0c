"""Models for family_coverage.py: the smallest of each timm module, and transformers types with cut configs."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

TYPES = """
llama qwen2 qwen3 gemma gemma2 gemma3_text gemma3 phi3 phi mistral mixtral olmo2 olmo granite granitemoe deepseek_v2
deepseek_v3 gpt_oss mamba mamba2 falcon_h1 smollm3 gpt2 gpt_neox gptj gpt_neo opt bloom falcon stablelm starcoder2
cohere cohere2 qwen2_moe qwen3_moe llama4_text glm4 nemotron jamba bamba vit dinov2 dinov3_vit dinov3_convnext swin
swinv2 convnext convnextv2 siglip siglip2 clip segformer detr deformable_detr rt_detr yolos mask2former resnet
mobilevit mobilevitv2 mobilenet_v1 mobilenet_v2 efficientnet regnet beit deit levit poolformer pvt pvt_v2 cvt bit
focalnet hiera ijepa vit_mae wav2vec2 wav2vec2-conformer wavlm whisper hubert data2vec-audio data2vec-text
data2vec-vision sew sew-d unispeech audio-spectrogram-transformer t5 mt5 umt5 bart mbart marian pegasus m2m_100 led
longt5 blenderbot prophetnet bert distilbert mpnet modernbert deberta deberta-v2 roberta xlm-roberta camembert electra
albert xlnet squeezebert mobilebert funnel longformer big_bird fnet nystromformer rembert ernie convbert ibert
roformer esm blip blip-2 align altclip chinese_clip clipseg groupvit owlvit owlv2 llava paligemma idefics3 smolvlm
qwen2_vl qwen2_5_vl dpt glpn depth_anything sam speech_to_text speecht5 vits encodec dac mimi clap seamless_m4t
moonshine nllb-moe switch_transformers timesformer videomae vivit audioflamingo3 bigbird_pegasus blenderbot-small fsmt
glmasr granite_speech mllama plbart pegasus_x qwen2_audio qwen3_asr seamless_m4t_v2 t5gemma t5gemma2 voxtral
llava_next llava_onevision internvl mistral3 dia kosmos-2 instructblip qwen3_vl aya_vision idefics2
""".split()  # noqa: SIM905
"""183 types of transformers: text, images, audio and multimodal."""

_HEADS = (
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "VIDEO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "MASKED_LM",
    "MASK_GENERATION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    "MULTIMODAL_LM",
    "TIME_SERIES_PREDICTION",
)
"""Tasks of transformers' auto classes; a type is built for the first that it has, else as its base model."""

_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "num_decoder_layers",
)
_SMALL = {
    **dict.fromkeys(_DEPTHS, 2),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        4,
    ),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "attention_head_size", "v_head_dim", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "mamba_n_heads"), 4),
    **dict.fromkeys(("projection_dim", "q_lora_rank", "moe_intermediate_size"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "layerdrop"), 0.0),
    "hidden_dim": 128,
    "vocab_size": 1000,
    "mamba_d_ssm": 64,
    "mamba_d_head": 16,
}
"""Sizes of a model that is quantized, saved and loaded in seconds."""

_FITTING: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "attn_layer_indices": [1],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_routed_experts": 8},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
}
"""Sizes that must fit each other."""

_LEFT_OUT: dict[str, dict[str, Any]] = {
    "nemotron": {"num_key_value_heads": 8},
    "deepseek_v2": {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 6},
    "wav2vec2-conformer": {"vocab_size": 32},
    "gemma3": {"vision_config": {"image_size": 896, "patch_size": 14}},
    "idefics3": {"vision_config": {"image_size": 364, "patch_size": 14}},
    "smolvlm": {"vision_config": {"image_size": 512, "patch_size": 16}},
    "granite_speech": {"projector_config": {"model_type": "blip_2_qformer", "encoder_hidden_size": 1024}},
    "t5gemma2": {"encoder": {"vision_config": {"image_size": 896, "patch_size": 14}}},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "qwen3_asr": {"audio_config": {"output_dim": 2048}},
    "qwen2_vl": {"vision_config": {"hidden_size": 8192}},
    "qwen2_5_vl": {"vision_config": {"out_hidden_size": 8192}},
    "qwen3_vl": {"vision_config": {"out_hidden_size": 4096}},
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
}


def timm_modules() -> dict[str, list[str]]:
    """Return {file of timm.models: the names it registers}, without timm's test models."""
    import timm

    found: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        if not name.startswith("test_"):
            found[timm.models.model_entrypoint(name).__module__.rpartition(".")[2]].append(name)
    return dict(found)


def smallest(names: list[str]) -> str:
    """Return the timm name with the fewest Parameters; models whose names say that they are large are not built."""
    import timm
    import torch

    large = re.compile(r"large|huge|giant|gigantic|_so\d|_\d+b_|xl|[_-](4[0-9]{2}|[5-9][0-9]{2})$")
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in timm.create_model(name).parameters())
            for name in [name for name in names if not large.search(name)] or names
        }
    return min(sizes, key=lambda name: (sizes[name], name))


def class_of(model_type: str) -> str:
    """Return the name of the class that represents a type of transformers."""
    from transformers.models.auto import modeling_auto

    for task in (*(f"FOR_{task}_" for task in _HEADS), ""):
        if found := getattr(modeling_auto, f"MODEL_{task}MAPPING_NAMES").get(model_type):
            return found if isinstance(found, str) else found[0]
    raise ValueError(f"transformers has no model of type {model_type!r}")


def all_types() -> list[str]:
    """Return the types of transformers that have a class for a task."""
    from transformers.models.auto import modeling_auto

    return list(dict.fromkeys(t for h in _HEADS for t in getattr(modeling_auto, f"MODEL_FOR_{h}_MAPPING_NAMES")))


def config_of(model_type: str) -> Any:
    """Return the default config of a type, completed where no model can be built or run from the default."""
    import transformers

    return _with_places(transformers.AutoConfig.for_model(model_type, **_LEFT_OUT.get(model_type, {})))


def _with_places(config: Any) -> Any:
    """Return the config with placeholder tokens for images and audio that are in its vocabulary."""
    words = getattr(config.get_text_config(), "vocab_size", None)
    for i, kind in enumerate(("image", "audio")):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(config, name, None)
            if words and hasattr(config, name) and not (isinstance(token, int) and token < words):
                setattr(config, name, words - 1 - i)
    return config


def cut(config: Any, layers: int = 2) -> Any:
    """Return a config with at most `layers` layers in each tower."""
    changed: dict[str, Any] = {}
    for key in _DEPTHS:
        depth = getattr(config, key, None)
        if key in _arguments(config) and isinstance(depth, int) and depth > layers:
            changed[key] = layers
    return _changed(config, changed, lambda part: cut(part, layers))


def tiny(config: Any) -> Any:
    """Return a config with the sizes of `_SMALL` in each tower."""
    arguments = _arguments(config)
    changed: dict[str, Any] = {}
    for key, value in _SMALL.items():
        size = getattr(config, key, None)
        if key in arguments and isinstance(size, (int, float)) and not isinstance(size, bool):
            changed[key] = min(value, size)
    for key in ("depths", "hidden_sizes"):
        sizes = getattr(config, key, None)
        if key in arguments and isinstance(sizes, (list, tuple)) and all(isinstance(x, int) for x in sizes):
            small = [1] * len(sizes) if key == "depths" else [x // 4 for x in sizes] if max(sizes) > 512 else sizes
            changed[key] = list(small)
    if isinstance(getattr(config, "embed_dim", None), int) and isinstance(getattr(config, "num_heads", None), list):
        changed["embed_dim"] = config.embed_dim // 4
    side = getattr(config, "image_size", None)
    if "image_size" in arguments and isinstance(side, int) and side > 128:
        changed["image_size"] = 112 if getattr(config, "patch_size", 4) == 14 else 128
    changed |= _FITTING.get(config.model_type, {})
    if words := changed.get("vocab_size"):
        for key, token in config.to_dict().items():
            if (
                key.endswith(("token_id", "token_index"))
                and max(token if isinstance(token, list) else [token or 0]) >= words
            ):
                changed[key] = words - 1 if "image" in key or "audio" in key else 2
    return _changed(config, changed, tiny)


def _arguments(config: Any) -> Any:
    return inspect.signature(type(config).__init__).parameters


def _changed(config: Any, values: dict[str, Any], part: Callable[[Any], Any]) -> Any:
    """Return the config with other values, and with its towers changed by `part`."""
    towers = {key: getattr(config, key, None) for key in getattr(type(config), "sub_configs", {})}
    own = {key: part(tower).to_dict() for key, tower in towers.items() if hasattr(tower, "to_dict")}
    kept = config.to_dict()
    depths = {(getattr(config, key), values[key]) for key in _DEPTHS if key in values}
    for key, value in kept.items():  # the types of the layers
        for before, after in depths:
            if isinstance(value, list) and len(value) == before:
                kept[key] = value[:after]
    return _with_places(type(config)(**{**kept, **values, **own}))
