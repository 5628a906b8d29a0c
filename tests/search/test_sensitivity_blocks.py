"""Scores of deep models, whose blocks run again on the way back instead of keeping what they computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.nn.blocks import Call
from hub_mpq.nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs, widths_off
from hub_mpq.nn.quantize import quantize_with_lsq
from hub_mpq.search import sensitivity as module
from hub_mpq.search.sensitivity import sensitivity
from hub_mpq.tasks import task_of


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Changes what it reads in place, and runs one of its layers twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, factor, shift=None):
        x.mul_(factor)
        if shift is not None:
            x = x + shift
        return (x + torch.tanh(self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))),)


class Deep(nn.Module):
    """Three blocks, the last of which reads what stands before the first one too; its stem is written into."""

    def __init__(self):
        super().__init__()
        self.stem, self.aside = nn.Linear(6, 8), nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = self.stem(x).add_(0.1)
        shift = self.aside(x)
        for i, block in enumerate(self.blocks):
            (y,) = block(y, 0.9, shift=shift if i == 2 else None)
        return self.head(y)


def config_of(name, **options):
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}Config")(vocab_size=64, num_attention_heads=4, **options)
        return made


def decoder():
    from transformers import LlamaForCausalLM

    made = config_of("Llama", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_key_value_heads=2)
    return LlamaForCausalLM(made), {"input_ids": torch.arange(64).view(4, 16)}


def encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    made = T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ids = torch.arange(64).view(4, 16)
    return T5ForConditionalGeneration(made), {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def shared_layers():
    from transformers import AlbertForMaskedLM

    made = config_of("Albert", embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    return AlbertForMaskedLM(made), {"input_ids": torch.arange(64).view(4, 16)}


def deep():
    return Deep(), draw(16, 6)


@pytest.fixture
def quantized():
    def make(build):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net, batch = build()
        example = batch[:1] if isinstance(batch, torch.Tensor) else {k: v[:1] for k, v in batch.items()}
        mpq = HubMPQ.from_module(net.eval(), example)
        model, task = mpq.model, task_of(None, mpq.model)
        widths = {x.name: ((2, 4), () if x.weight_only else (4, 8)) for x in mpq.graph}
        layers = quantize_with_lsq(model, mpq.graph, widths, per_channel=True)
        calibrate_weights(model, mse=True)
        calibrate_inputs(model, sample_inputs(model, [batch], task.forward), mse=True)
        return layers, model.eval(), [batch], task

    return make


@pytest.mark.parametrize("build", [deep, decoder, encoder_decoder, shared_layers], ids=lambda build: build.__name__)
def test_blocks_that_run_again_give_the_same_scores(build, quantized, monkeypatch):
    layers, model, batches, task = quantized(build)
    seen = []
    plain = Call.plain.fget
    monkeypatch.setattr(Call, "plain", property(lambda call: seen.append(plain(call)) or plain(call)))
    with widths_off(model):
        again = sensitivity(layers, model, batches, task)
        count = len(seen)
        monkeypatch.setattr(module, "blocks_of", lambda *_: {})
        whole = sensitivity(layers, model, batches, task)
    assert len(seen) == count
    assert all(seen)
    assert count == {"deep": 3, "decoder": 3, "encoder_decoder": 2, "shared_layers": 0}[build.__name__]
    for side in ("weight", "activation", "weight_error"):
        one, other = getattr(again, side), getattr(whole, side)
        assert set(one) == set(other)
        for name, row in one.items():
            assert row == pytest.approx(other[name], rel=1e-4), (side, name)


def test_products_with_the_change_of_a_weight_are_differences_of_outputs(quantized):
    layers, model, _, _ = quantized(deep)
    for layer in layers.values():
        x = draw(7, layer.in_features)
        with torch.no_grad(), widths_off(model):
            direct = dict(module._matrix_errors(layer, x))
            plain = dict(module._errors(layer, layer.weight_quantizer, (x,), False))
        assert list(direct) == [2, 4]
        for bits in (2, 4):
            torch.testing.assert_close(direct[bits], plain[bits], rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was_after_an_error_too(quantized, monkeypatch):
    layers, model, batches, task = quantized(decoder)
    learning = {name: i % 3 > 0 for i, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning[name])
        parameter.grad = torch.ones_like(parameter)

    def check():
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == learning[name]
            assert bool((parameter.grad == 1).all())
        assert model.config.use_cache
        assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())

    with widths_off(model):
        sensitivity(layers, model, batches, task)
        check()
        monkeypatch.setattr(module, "_products", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sensitivity(layers, model, batches, task)
        check()
