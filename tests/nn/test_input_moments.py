"""Second moments of what layers read, block by block or from the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.nn.block_walk import BlockWalk
from hub_mpq.nn.blocks import blocks_of
from hub_mpq.nn.input_moments import input_moments
from hub_mpq.tasks import task_of


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows=8, length=16, count=2, words=64):
    made = torch.randint(words, (count, rows, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids} for ids in made]


def decoder(depth=3, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return seeded(lambda: LlamaForCausalLM(made))


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def bert():
    from transformers import BertConfig, BertForMaskedLM

    made = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return seeded(lambda: BertForMaskedLM(made))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    made = T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=3, num_heads=4, decoder_start_token_id=0)
    return seeded(lambda: T5ForConditionalGeneration(made))


def parts_of(net, batches, **options):
    """(graph, the parts that `input_moments` gives, {layer: what a plain hook sees it read})."""
    first = batches[0]
    example = {k: v[:1] for k, v in first.items()} if isinstance(first, dict) else first[:1]
    mpq = HubMPQ.from_module(net, example)
    task = task_of(None, mpq.model)
    read = {layer.name: [] for layer in mpq.graph}
    handles = [
        mpq.model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, kwargs, name=name: read[name].append((*args, *kwargs.values())[0].detach().clone()),
            with_kwargs=True,
        )
        for name in read
    ]
    with torch.no_grad():
        for batch in batches:
            task.forward(mpq.model, batch)
    for handle in handles:
        handle.remove()
    return mpq.graph, list(input_moments(mpq.model, mpq.graph, batches, task.forward, **options)), read


def plain(read, kept=None):
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in read]).double()
    x = x if kept is None else x[kept.flatten()]
    return (x.t() @ x / len(x)).float()


@pytest.fixture
def walks(monkeypatch):
    """How many models were walked block by block to the end of their blocks."""
    seen = []
    step = BlockWalk.step

    def counted(self, name, before):
        same = step(self, name, before)
        seen.append((name, same))
        return same

    monkeypatch.setattr(BlockWalk, "step", counted)
    return seen


@pytest.mark.parametrize("make", [decoder, bert, gpt2], ids=lambda make: make.__name__)
def test_moments_of_every_layer_block_by_block(make, walks):
    batches = tokens()
    graph, parts, read = parts_of(make(), batches)
    found = {name: h for part in parts for name, h in part.moments.items()}
    assert set(found) == {layer.name for layer in graph if not layer.weight_only}
    for name, h in found.items():
        assert h.dtype == torch.float32
        torch.testing.assert_close(h, plain(read[name]), rtol=1e-4, atol=1e-5)
    assert [same for _, same in walks] == [True] * 3
    # the first parts are the blocks', in order of depth
    for part, (block, _) in zip(parts, walks, strict=False):
        assert part.layers
        assert all(layer.name.startswith(f"{block}.") for layer in part.layers)


def test_layers_that_read_one_tensor_have_one():
    _, parts, _ = parts_of(decoder(), tokens())
    for part in parts:
        shared = {}
        for layer in part.layers:
            assert shared.setdefault(layer.buffer, part.moments[layer.name]) is part.moments[layer.name]
    assert len({id(h) for h in parts[0].moments.values()}) == 4  # q k v, out, gate up, down


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision(dtype):
    _, parts, read = parts_of(decoder().to(dtype), tokens())
    for part in parts:
        for name, h in part.moments.items():
            torch.testing.assert_close(h, plain(read[name]), rtol=1e-3, atol=1e-4)


def test_encoders_and_decoders(walks):
    """Blocks of both halves are of one type: neither holds more than the other's share, and all layers are read."""
    ids = tokens()
    batches = [{**batch, "decoder_input_ids": batch["input_ids"].flip(1)} for batch in ids]
    graph, parts, read = parts_of(t5(), batches)
    found = {name: h for part in parts for name, h in part.moments.items()}
    assert set(found) == {layer.name for layer in graph if not layer.weight_only}
    for name, h in found.items():
        torch.testing.assert_close(h, plain(read[name]), rtol=1e-4, atol=1e-5)


class Stateful(nn.Module):
    """A block that adds what the block before it left behind."""

    left = None

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, shared):
        x = x + self.layer(x + shared.pop("left", 0))
        shared["left"] = x
        return x


class Chain(nn.Module):
    """Blocks that only pass a hidden state, or a dict beside it, or something that is added to it outside of them."""

    def __init__(self, how):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            Stateful() if how == "dict" else nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)
        )
        self.last, self.how = nn.Linear(8, 4), how

    def forward(self, x):
        x, shared, skip = self.first(x), {}, 0
        for block in self.blocks:
            if self.how == "dict":
                x = block(x, shared)
            elif self.how == "twice":
                x = block(block(x))
            else:
                x, skip = block(x + skip), (x if self.how == "skip" else 0)
        return self.last(x)


@pytest.mark.parametrize("how", ["plain", "dict", "twice", "skip"])
def test_models_that_are_more_than_their_blocks_run_whole(how, walks):
    batches = [draw(16, 6, seed=i) for i in range(3)]
    graph, parts, read = parts_of(seeded(lambda: Chain(how)), batches)
    found = {name: h for part in parts for name, h in part.moments.items()}
    assert set(found) == set(graph.names)
    for name, h in found.items():
        torch.testing.assert_close(h, plain(read[name]), rtol=1e-4, atol=1e-5)
    assert sum(same for _, same in walks) == {"plain": 3, "dict": 3, "twice": 0, "skip": 1}[how]


def test_a_limit_of_memory_makes_parts():
    batches = [draw(16, 6, seed=i) for i in range(3)]
    _, whole, _ = parts_of(seeded(lambda: Chain("twice")), batches)
    _, parts, _ = parts_of(seeded(lambda: Chain("twice")), batches, limit=2 * 4 * 8 * 8)
    assert len(whole) == 1
    assert [len(part.layers) for part in parts] == [2, 2, 1]
    one, other = ({n: h for p in each for n, h in p.moments.items()} for each in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_diagonals_alone():
    _, full, _ = parts_of(decoder(), tokens())
    _, parts, _ = parts_of(decoder(), tokens(), diagonal=True)
    for one, other in zip(full, parts, strict=True):
        for name, h in one.moments.items():
            torch.testing.assert_close(other.moments[name], h.diagonal(), rtol=1e-4, atol=1e-6)


def test_padding_does_not_count():
    batches = tokens()
    for i, batch in enumerate(batches):
        batch["attention_mask"] = (torch.arange(16)[None] < torch.arange(4, 12)[:, None] + i).long()
    net = bert()
    task = task_of(None, net)
    _, parts, read = parts_of(net, batches, mask=task.mask)
    kept = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    for name, h in parts[0].moments.items():
        torch.testing.assert_close(h, plain(read[name], kept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["OPT", "Qwen2Moe", "DeepseekV3"])
def test_padding_does_not_count_where_positions_have_another_form(name):
    """OPT's and shared experts' matrices read the tokens of all samples in one axis, kv_b_proj with an axis of one."""
    import transformers

    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    own = {
        "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "Qwen2Moe": {
            "num_key_value_heads": 2,
            "num_experts": 4,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 40,
        },
        "DeepseekV3": {**latent, "num_key_value_heads": 4, "first_k_dense_replace": 2},
    }[name]
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(**{**text, "num_hidden_layers": 2, "pad_token_id": 0, **own})
    net = seeded(lambda: getattr(transformers, f"{name}ForCausalLM")(config))
    found = []
    for other in (0, 5):  # what the padding holds
        batches = tokens()
        for batch in batches:
            batch["attention_mask"] = (torch.arange(16)[None] < torch.arange(4, 12)[:, None]).long()
            batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], other)
        mpq = HubMPQ.from_module(net, batches[0])
        task = task_of(None, net, batches[0])
        parts = input_moments(mpq.float_model, mpq.graph, batches, task.forward, mask=task.mask)
        found.append({layer: h for part in parts for layer, h in part.moments.items()})
    assert len(found[0]) > 8
    for layer, h in found[0].items():
        assert torch.allclose(h, found[1][layer], rtol=1e-4, atol=1e-6 * float(h.abs().max())), layer


def test_positions_bound_what_is_read():
    batches = [draw(500, 6, seed=i) for i in range(3)]
    _, parts, read = parts_of(seeded(lambda: Chain("plain")), batches, positions=300)
    x = torch.cat([x[::5] for x in read["first"]])
    torch.testing.assert_close(parts[-1].moments["first"], plain([x]))


def test_the_model_is_left_as_it_was():
    net = decoder()
    task = task_of(None, net)
    mpq = HubMPQ.from_module(net, tokens()[0])
    mpq.model.train()
    mpq.model.model.layers[1].eval()
    modes = [module.training for module in mpq.model.modules()]
    before = {name: x.clone() for name, x in mpq.model.state_dict().items()}
    for _ in input_moments(mpq.model, mpq.graph, tokens(), task.forward):
        assert torch.is_grad_enabled()
        assert [module.training for module in mpq.model.modules()] == modes
    assert mpq.model.config.use_cache
    assert not any("forward" in vars(m) or m._forward_hooks for m in mpq.model.modules())
    assert all(torch.equal(x, before[name]) for name, x in mpq.model.state_dict().items())


def test_values_that_are_not_finite_are_refused():
    x = draw(4, 6)
    x[1, 2] = torch.nan
    with pytest.raises(InvalidArgument, match="NaN"):
        parts_of(seeded(lambda: Chain("plain")), [x])


def test_convolutions_have_none():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)))
    _, parts, _ = parts_of(net, [draw(2, 3, 5, 5)])
    assert [list(part.moments) for part in parts] == [["2"]]


def test_layers_that_no_batch_reaches_have_none():
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    mpq = HubMPQ.from_module(net, draw(1, 6))
    parts = list(input_moments(mpq.model, mpq.graph, [], lambda m, x: m(x)))
    assert [part.moments for part in parts] == [{}]


def test_blocks():
    net = decoder()
    weights = {name: m.weight.numel() for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert list(blocks_of(net, weights)) == [f"model.layers.{i}" for i in range(3)]
    assert not blocks_of(net, {"lm_head": 10, "model.layers.0.mlp.up_proj": 9})
    assert not blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), {"0": 4})
    assert not blocks_of(nn.Linear(2, 2), {})
