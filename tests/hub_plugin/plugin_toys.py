"""Tiny models of transformers and timm, built from configs, their packed folders, and fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hub_mpq import HubMPQ

IDS = {"input_ids": (torch.arange(12)[None] * 7) % 50}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "max_position_embeddings": 16}


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}


def build(kind: str, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """(a float model with random weights, one input) of a kind named in the table."""
    import transformers as t

    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    table: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "bert": (t.BertForMaskedLM, t.BertConfig, {**SMALL, **TEXT}),
        "classifier": (t.BertForSequenceClassification, t.BertConfig, {**SMALL, **TEXT, "num_labels": 3}),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, {**gpt2, **ends}),
        "vit": (t.ViTForImageClassification, t.ViTConfig, {**SMALL, "image_size": 32, "patch_size": 8}),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {**SMALL, **TEXT, **ends, "tie_word_embeddings": True}),
        "t5": (
            t.T5ForConditionalGeneration,
            t.T5Config,
            {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50, **ends},
        ),
        "mixtral": (
            t.MixtralForCausalLM,
            t.MixtralConfig,
            {**SMALL, **TEXT, **ends, "num_key_value_heads": 2, "num_local_experts": 4},
        ),
    }
    cls, config, values = table[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config(**{**values, **changes})).eval()
    if kind == "t5":
        return model, {**IDS, "decoder_input_ids": IDS["input_ids"].flip(1)}
    return model, _pixels() if kind == "vit" else IDS


@dataclass
class Packed:
    """A float folder, the packed folder made of it, the HubMPQ it was made by, and one input."""

    float_folder: Path
    folder: Path
    mpq: HubMPQ
    inputs: dict[str, torch.Tensor]
    cls: Any

    @torch.no_grad()
    def logits(self, model: Any = None) -> torch.Tensor:
        return (model or self.mpq)(**self.inputs)[0]


def pack(root: Path, kind: str, level: str = "W3A6", **changes: Any) -> Packed:
    model, inputs = build(kind, **changes)
    model.save_pretrained(root / "float")
    mpq = HubMPQ.from_pretrained(root / "float")
    mpq.apply_policy(level)
    mpq.save_pretrained(root / "packed")
    return Packed(root / "float", root / "packed", mpq, inputs, type(model))


def python(script: str, *args: object) -> str:
    """Run a script in a fresh process; its standard output. Fails with its standard error."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
