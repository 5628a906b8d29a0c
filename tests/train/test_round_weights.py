"""Weights are rounded once, for all that a search may choose."""

import copy

import pytest
import torch
from text_toys import decoder
from torch import nn

from hub_mpq import HubMPQ, Policy
from hub_mpq.adapters import from_module
from hub_mpq.core import LayerBits
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.nn.packing import packed_weight
from hub_mpq.nn.quantize import quantized_layers
from hub_mpq.train import round_weights as module
from hub_mpq.train.apply_policy import apply_policy
from hub_mpq.train.round_weights import round_weights, weight_choices

IDS = torch.randint(0, 48, (24, 32), generator=torch.Generator().manual_seed(2))
BATCHES = [{"input_ids": IDS[i : i + 4]} for i in range(0, 24, 4)]


@pytest.fixture(scope="module")
def mpq():
    return HubMPQ.from_module(decoder(), BATCHES[0], weight_only=True)


def choices(mpq, *levels):
    found = {name: tuple(LayerBits.parse(x) for x in levels) for name in mpq.graph.names}
    return {x.name: found[x.name] if x.fixed is None else (x.fixed.of_weight,) for x in mpq.graph}


def output_error(mpq, rounded, level):
    """Mean over layers of the error of their outputs on the batches, relative."""
    seen, errors = {}, []
    model = mpq.float_model
    names = [x.name for x in mpq.graph.searched]
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda m, a, n=n: seen.setdefault(n, []).append(a[0].flatten(0, 1))
        )
        for n in names
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    for handle in handles:
        handle.remove()
    for name in names:
        x, weight = torch.cat(seen[name]), model.get_submodule(name).weight.detach()
        error = rounded.packed(name, LayerBits.parse(level)).dequantize() - weight
        errors.append(float((x @ error.t()).square().sum() / (x @ weight.t()).square().sum()))
    return sum(errors) / len(errors)


LEVELS = ["W3A32", "W2g16A32", "W4g16zA32", "W3zA32", "W1A32"]


def test_all_choices_of_a_layer_are_there_and_compensated_ones_are_nearer_at_the_output(mpq):
    found = {
        rounding: round_weights(mpq.float_model, mpq.graph, choices(mpq, *LEVELS), BATCHES, rounding=rounding)
        for rounding in ("gptq", "nearest")
    }
    for level in LEVELS:
        bits = LayerBits.parse(level)
        for layer in mpq.graph.searched:
            assert found["gptq"].packed(layer.name, bits).bits == bits
        assert output_error(mpq, found["gptq"], level) < output_error(mpq, found["nearest"], level)
    with pytest.raises(HubMPQError, match="was not rounded for W5A32"):
        found["gptq"].packed(mpq.graph.searched[0].name, LayerBits(5, 32))
    assert found["gptq"].packed("model.embed_tokens", LayerBits(8, 32)).num_bits == 8


def test_the_float_model_stays_as_it_is(mpq):
    before = copy.deepcopy(mpq.float_model.state_dict())
    round_weights(mpq.float_model, mpq.graph, choices(mpq, "W3A32"), BATCHES)
    after = mpq.float_model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mpq.float_model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["W3A32", "W4g16zA32"])
def test_a_policy_takes_the_rounded_weights(dtype, level):
    net = decoder().to(dtype)
    mpq = HubMPQ.from_module(net, BATCHES[0], weight_only=True)
    rounded = round_weights(net, mpq.graph, choices(mpq, level), BATCHES)
    mpq.apply_policy(level, BATCHES)
    for name, layer in quantized_layers(mpq.model):
        packed = packed_weight(layer, mpq.graph[name].kind)
        wanted = rounded.packed(name, mpq.policy.bits[name])
        assert packed.parts().keys() == wanted.parts().keys()
        assert all(torch.equal(packed.parts()[k], wanted.parts()[k]) for k in wanted.parts()), name
        assert torch.equal(layer.weight_quantizer(layer.weight), wanted.dequantize().to(dtype))


def test_nearest_points_leave_the_float_weights(mpq):
    mpq.apply_policy("W3g16", BATCHES, rounding="nearest")
    rounded = round_weights(mpq.float_model, mpq.graph, choices(mpq, "W3g16A32"), BATCHES, rounding="nearest")
    for name, layer in quantized_layers(mpq.model):
        assert torch.equal(layer.weight, mpq.float_model.get_submodule(name).weight)
        wanted = rounded.packed(name, mpq.policy.bits[name])
        assert torch.equal(packed_weight(layer, mpq.graph[name].kind).unpack(), wanted.unpack())


def test_what_an_interrupted_run_left_is_taken_over(mpq, tmp_path, monkeypatch):
    of = mpq.float_model, mpq.graph, choices(mpq, "W3A32", "W4g16A32")
    done, whole = [], module.round_weight

    def stops(weight, layer, *args):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(layer.name)
        return whole(weight, layer, *args)

    monkeypatch.setattr(module, "round_weight", stops)
    with pytest.raises(KeyboardInterrupt):
        round_weights(*of, BATCHES, folder=tmp_path / "r")
    first, done[:] = list(done), []
    monkeypatch.setattr(module, "round_weight", lambda w, layer, *a: (done.append(layer.name), whole(w, layer, *a))[1])
    again = round_weights(*of, BATCHES, folder=tmp_path / "r", resume=True)
    assert len(done) + len(first) == len(mpq.graph)
    assert not set(done) & set(first)
    fresh = round_weights(*of, BATCHES, folder=tmp_path / "s")
    for layer in mpq.graph:
        for bits in of[2][layer.name]:
            a, b = (r.packed(layer.name, bits).parts() for r in (again, fresh))
            assert all(torch.equal(a[k], b[k]) for k in a), layer.name


@pytest.mark.parametrize("change", ["weight", "norm", "batches", "rounding", "choices", "torn", "not asked for"])
def test_files_of_another_run_are_not_taken_over(mpq, tmp_path, monkeypatch, change):
    net, batches, rounding, levels = copy.deepcopy(mpq.float_model), BATCHES, "gptq", ["W3A32"]
    folder = tmp_path / "r"
    round_weights(net, mpq.graph, choices(mpq, *levels), batches, folder=folder)
    if change == "weight":
        with torch.no_grad():
            net.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    elif change == "norm":  # of no layer, but other layers read what it makes
        with torch.no_grad():
            net.model.norm.weight[0] += 1e-3
    elif change == "batches":
        batches = [{"input_ids": batch["input_ids"].flip(1)} for batch in BATCHES]
    elif change == "rounding":
        rounding = "nearest"
    elif change == "choices":
        levels = ["W3A32", "W2A32"]
    elif change == "torn":
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes()[:-7])
    done, whole = [], module.round_weight
    monkeypatch.setattr(module, "round_weight", lambda w, layer, *a: (done.append(layer.name), whole(w, layer, *a))[1])
    resume = change != "not asked for"
    found = round_weights(
        net, mpq.graph, choices(mpq, *levels), batches, folder=folder, rounding=rounding, resume=resume
    )
    searched = {x.name for x in mpq.graph.searched}
    assert set(done) >= searched
    assert len(done) == (len(searched) if change == "choices" else len(mpq.graph))
    assert found.packed("model.layers.0.mlp.up_proj", LayerBits(3, 32)).num_bits == 3


def test_a_digest_is_of_tensors_and_lists():
    made = [module.digest_of(x) for x in (IDS, IDS + 1, IDS.tolist(), (IDS + 1).tolist(), IDS.float(), IDS.flatten())]
    assert len(set(made)) == len(made)
    assert module.digest_of({"a": IDS}) == module.digest_of([IDS.clone()])


def test_a_full_disk_is_one_sentence(mpq, tmp_path):
    (tmp_path / "r").write_text("a file")
    with pytest.raises(HubMPQError, match="cannot be written"):
        round_weights(mpq.float_model, mpq.graph, choices(mpq, "W3A32"), BATCHES, folder=tmp_path / "r")


def test_convolutions_and_heads_are_rounded_too(make_net):
    images = [torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    source = from_module(make_net(), images[0])
    graph = source.graph.with_fixed({"*": None})
    levels = {x.name: (LayerBits(3, 32),) for x in graph}
    found = round_weights(source.model, graph, levels, images)
    near = round_weights(source.model, graph, levels, images, rounding="nearest")
    for layer in graph:
        a, b = (r.packed(layer.name, LayerBits(3, 32)) for r in (found, near))
        # convolutions take the nearest points: their columns are not compensated
        assert torch.equal(a.unpack(), b.unpack()) == (layer.kind == "conv2d")


def test_what_cannot_be_is_said(mpq):
    with pytest.raises(InvalidArgument, match="'gptq' or 'nearest', got 'awq'"):
        mpq.apply_policy("W4", BATCHES, rounding="awq")
    with pytest.raises(InvalidArgument, match="empty"):
        round_weights(mpq.float_model, mpq.graph, choices(mpq, "W3A32"), [])
    with pytest.raises(InvalidArgument, match="one scale per tensor"):
        mpq.apply_policy("W4", BATCHES, rounding="gptq", per_channel=False)
    net = copy.deepcopy(mpq.float_model)
    net.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidArgument, match="NaN"):
        apply_policy(net, mpq.graph, Policy.uniform(mpq.graph, "W4A32"), BATCHES, rounding="gptq")


def test_choices_of_a_shared_weight_are_its_owners():
    tied = HubMPQ.from_module(decoder(tie_word_embeddings=True), BATCHES[0], weight_only=True, fixed={"*": None})
    found = weight_choices(tied.graph, tied._candidates(tied.graph, [3, 4], [None, 16]))
    assert "lm_head" not in found
    assert [str(b) for b in found["model.embed_tokens"]] == ["W3A32", "W3g16A32", "W4A32", "W4g16A32"]


def test_a_layer_that_no_batch_reaches_is_rounded():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, which=None):
            return self.a(x) + (0 if which is None else self.b(x))

    net = Two()
    source = from_module(net, (torch.randn(4, 16), torch.ones(1)))
    graph = source.graph.with_fixed({"*": None})
    found = round_weights(net, graph, {"a": (LayerBits(4, 32),), "b": (LayerBits(4, 32),)}, [torch.randn(4, 16)])
    assert found.packed("b", LayerBits(4, 32)).num_bits == 4
