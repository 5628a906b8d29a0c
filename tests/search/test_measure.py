"""Measuring a policy on the one copy of all widths gives what the applied policy gives."""

import copy
import errno

import pytest
import torch
import transformers
from torch import nn

from hub_mpq import HubMPQ, Policy
from hub_mpq.core import LayerBits
from hub_mpq.errors import InvalidArgument
from hub_mpq.search.candidates import resolve_candidates
from hub_mpq.search.kept_outputs import KeptOutputs
from hub_mpq.search.measure import PolicyMeter
from hub_mpq.tasks import task_of

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WIDTHS = (1, 2, 4)


def mixed(graph, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = {}
    for layer in graph:
        w, a = (WIDTHS[int(i)] for i in torch.randint(len(WIDTHS), (2,), generator=generator))
        bits[layer.name] = layer.fixed or LayerBits(w, 32 if layer.weight_only else a)
    return Policy(bits, graph.digest)


def expected(mpq, policy, calibration, batches, task):
    """Divergences of the applied policy, item by item."""
    quantized = mpq.apply_policy(policy, calibration, task=task).model
    known = task_of(task, mpq.float_model, batches[0], mpq.source.example)
    rows = []
    with torch.no_grad():
        for batch in batches:
            outputs = [known.forward(model, batch) for model in (quantized, mpq.float_model)]
            values, mask = known.divergence(*outputs, known.mask(batch))
            rows.append(values[mask])
    return torch.cat(rows).double()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_with_norms_is_measured_as_it_is_applied(net, data, seed):
    x, y = data.tensors
    calibration = [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]
    held = [(x[48:70], y[48:70]), (x[70:], y[70:])]
    before = copy.deepcopy(net.state_dict())
    mpq = HubMPQ.from_module(net, X[:1], task="classification")
    meter = PolicyMeter(net, mpq.graph, resolve_candidates(mpq.graph, WIDTHS), calibration, task="classification")
    policies = [mixed(mpq.graph, seed), mixed(mpq.graph, seed + 10), mixed(mpq.graph, seed)]  # the first one again
    for policy in policies:
        found = meter.measure(policy, held)
        assert found.dtype == torch.float64
        assert found.shape == (48,)
        wanted = expected(mpq, policy, calibration, held, "classification")
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        sums, counts = meter.measure_samples(policy, held)
        assert torch.equal(sums, found)
        assert counts.tolist() == [1.0] * 48
    assert meter.forwards == 3 + 2 + 2 * 3 + 6 * 2, "scales, references, norms of two policies, six measurements"
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "the user's network was changed"


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config).eval()


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes)).eval()


@pytest.mark.parametrize("make", [gpt2, bert])
def test_a_model_of_transformers_is_measured_as_it_is_applied(make):
    model = make()
    generator = torch.Generator().manual_seed(1)

    def batch(rows):
        mask = torch.ones(rows, 12, dtype=torch.long)
        mask[0, 7:] = 0
        return {"input_ids": torch.randint(0, 40, (rows, 12), generator=generator), "attention_mask": mask}

    calibration, held = [batch(4), batch(4)], [batch(5), batch(3)]
    mpq = HubMPQ.from_module(model, batch(1))
    widths = resolve_candidates(mpq.graph, WIDTHS)
    meter = PolicyMeter(model, mpq.graph, widths, calibration, example=mpq.source.example)
    policy = mixed(mpq.graph, 3)
    found = meter.measure(policy, held)
    torch.testing.assert_close(found, expected(mpq, policy, calibration, held, None), rtol=1e-5, atol=1e-7)
    sums, counts = meter.measure_samples(policy, held)
    if make is gpt2:
        assert counts.tolist() == [7, 12, 12, 12, 12, 7, 12, 12], "padding does not count"
    assert float(sums.sum()) == pytest.approx(float(found.sum()))
    assert meter.items(held[0]) == (5, int(counts[:5].sum()), make is gpt2)


def test_a_policy_of_other_widths_is_refused(net, data):
    mpq = HubMPQ.from_module(net, X[:1])
    batches = [data.tensors[0][:16]]
    meter = PolicyMeter(net, mpq.graph, resolve_candidates(mpq.graph, [2, 4]), batches)
    with pytest.raises(InvalidArgument, match=r"'3': weight bits must be one of .*, got 3"):
        meter.measure(Policy.uniform(mpq.graph, "W3A4"), batches)
    with pytest.raises(InvalidArgument, match=r"'3': input bits must be one of .*, got 8"):
        meter.measure(Policy.uniform(mpq.graph, "W4A8"), batches)
    freed = mpq.graph.with_fixed({"0": "W4A4"})
    with pytest.raises(InvalidArgument, match="'0' is fixed at W8A8"):
        meter.measure(Policy.uniform(freed, "W4A4"), batches)
    with pytest.raises(InvalidArgument, match="empty"):
        PolicyMeter(net, mpq.graph, resolve_candidates(mpq.graph, [2, 4]), [])


class Noisy(nn.Module):
    """Draws random numbers in its forward, as models that mask their input do."""

    def __init__(self):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.first(x + torch.randn_like(x))).relu())


def test_both_networks_draw_the_same_random_numbers_and_nobody_elses():
    net = Noisy().eval()
    x = torch.randn(8, 6)
    mpq = HubMPQ.from_module(net, x[:1])
    meter = PolicyMeter(net, mpq.graph, resolve_candidates(mpq.graph, [2, 8]), [x])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fine, again = (meter.measure(Policy.uniform(mpq.graph, "W8A8"), [x]) for _ in range(2))
    assert torch.equal(fine, again)
    assert float(fine.mean()) < 0.01
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs_that_are_not_kept_are_computed_again(net, data, monkeypatch):
    """Those beyond the limit, and those that find the disk full."""
    held = [data.tensors[0][48:70], data.tensors[0][70:]]
    mpq = HubMPQ.from_module(net, X[:1], task="classification")
    candidates = resolve_candidates(mpq.graph, WIDTHS)

    def measured():
        meter = PolicyMeter(net, mpq.graph, candidates, [data.tensors[0][:16]], task="classification")
        values = [meter.measure(mixed(mpq.graph, seed), held) for seed in (0, 1)]
        return torch.cat(values), meter.forwards

    kept, forwards = measured()
    with monkeypatch.context() as patch:
        patch.setattr("hub_mpq.search.kept_outputs.LIMIT", 22 * 5 * 4)  # the first batch's
        again = measured()
        assert torch.equal(again[0], kept)
        assert again[1] == forwards + 1

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(KeptOutputs, "_written", full)
    again = measured()
    assert torch.equal(again[0], kept)
    assert again[1] == forwards + 2


def test_kept_outputs_come_back_as_they_were():
    kept, batch = KeptOutputs(), object()
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    parts = {
        "t": logits.t(),
        "half": logits.bfloat16(),
        "ids": torch.arange(4),
        "none": None,
        "of": (2, torch.ones(())),
    }
    kept.add(batch, parts | {"empty": torch.ones(0, 2)})
    back = kept.get(batch)
    assert back["none"] is None
    assert back["of"][0] == 2
    assert back["empty"].shape == (0, 2)
    for name in ("t", "half", "ids"):
        assert back[name].dtype == parts[name].dtype
        assert torch.equal(back[name], parts[name])
    assert torch.equal(back["of"][1], torch.ones(()))
    output = transformers.modeling_outputs.MaskedLMOutput(logits=logits)
    kept.add(again := object(), output)
    assert type(kept.get(again)) is type(output)
    assert torch.equal(kept.get(again).logits, logits)
    kept.add(other := object(), {"logits": logits, "object": object()})
    assert kept.get(other) is None
    folder = kept._folder
    del kept
    assert not folder.exists()
