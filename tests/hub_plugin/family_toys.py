"""Tiny decoders and encoder-decoders with stacked experts or scaled embeddings, and their packed folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hub_mpq import HubMPQ

IDS = (torch.arange(24).view(2, 12) * 7) % 250 + 3
_TEXT = {
    **{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1},
}
_TOP = {"num_experts_per_tok": 2}
_BOTH = {
    **{"vocab_size": 1024, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 16},
    **{"scale_embedding": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
}
_LATENT = {
    **{"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**_TEXT, **_TOP, "intermediate_size": 48, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {**_TEXT, **_TOP, "head_dim": 8, "moe_intermediate_size": 40, "num_experts": 4}),
    "olmoe": ("Olmoe", {**_TEXT, **_TOP, "intermediate_size": 40, "num_experts": 4}),
    "granitemoe": ("GraniteMoe", {**_TEXT, **_TOP, "intermediate_size": 40, "num_local_experts": 4}),
    "gpt_oss": ("GptOss", {**_TEXT, **_TOP, "head_dim": 8, "intermediate_size": 40, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3",
        {**_TEXT, **_TOP, **_LATENT, "intermediate_size": 48, "moe_intermediate_size": 40, "n_routed_experts": 4},
    ),
    "gemma3": ("Gemma3Text", {**_TEXT, "head_dim": 8, "intermediate_size": 48}),
    "bart": ("Bart", _BOTH),
    "m2m_100": ("M2M100", _BOTH),
}
STACKED = ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3")


def build(kind: str) -> Any:
    """A float model with random weights that say something."""
    import transformers

    name, values = CONFIGS[kind]
    config = getattr(transformers, f"{name}Config")(**values)
    cls = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


@dataclass
class Family:
    """The float folder of a model, a packed one, the HubMPQ it was made by, and the class that loads both."""

    kind: str
    float_folder: Path
    folder: Path
    mpq: HubMPQ
    size: int
    cls: Any

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """One batch."""
        both = {"decoder_input_ids": IDS.flip(0)} if self.mpq.model.config.is_encoder_decoder else {}
        return {"input_ids": IDS, **both}

    @torch.no_grad()
    def logits(self, model: Any = None) -> torch.Tensor:
        return (model or self.mpq)(**self.inputs).logits


def make(root: Path, kind: str, level: str = "W4") -> Family:
    model = build(kind)
    model.save_pretrained(root / "float")
    mpq = HubMPQ.from_pretrained(root / "float", weight_only=True, sequence_length=12)
    mpq.apply_policy(level)
    size = mpq.save_pretrained(root / "packed")
    return Family(kind, root / "float", root / "packed", mpq, size, type(model))
