"""Prints the peak memory of measuring a policy on several batches, whose outputs are over a large vocabulary, in
outputs of one batch, beyond what there is before it."""

import json
import sys

import torch
from memory_by_depth import peak
from transformers import LlamaConfig, LlamaForCausalLM

from hub_mpq import HubMPQ, Policy
from hub_mpq.nn.rounded_weights import RoundedWeights
from hub_mpq.search.candidates import resolve_candidates
from hub_mpq.search.measure import PolicyMeter
from hub_mpq.train.round_weights import round_weights, weight_choices

ROWS, TOKENS, WORDS = 2, 128, 60_000
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def measured(count):
    """Peak of measuring on `count` batches, of one output each."""
    held = [{"input_ids": ids} for ids in torch.randint(WORDS, (count, ROWS, TOKENS))]
    meter = PolicyMeter(mpq.model, mpq.graph, candidates, calibration, rounded=rounded)

    def work():
        for batch in held:
            meter.items(batch)
        for level in ("W4", "W2"):
            sums, _ = meter.measure_samples(Policy.uniform(mpq.graph, level), held)
            assert len(sums) == count * ROWS

    return peak(work) / (4 * ROWS * TOKENS * WORDS)


torch.manual_seed(0)
net = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, tie_word_embeddings=True, **SIZES)).eval()
calibration = [{"input_ids": torch.randint(WORDS, (1, 8))}]
mpq = HubMPQ.from_module(net, calibration[0], exclude=["model.embed_tokens"], weight_only=True)
candidates = resolve_candidates(mpq.graph, [2, 4])
rounded: RoundedWeights = round_weights(net, mpq.graph, weight_choices(mpq.graph, candidates), calibration)
measured(1)
print(json.dumps([measured(int(count)) for count in sys.argv[1:]]))
