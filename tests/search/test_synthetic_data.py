"""Inputs that are made up: what is noise, what is drawn from a table, what stays as the example has it."""

import pytest
import torch
import transformers as T
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.search.synthetic_data import BATCH, synthetic_batch

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
IDS = torch.arange(5, 15)[None]
ONES = torch.ones(1, 10, dtype=torch.long)


def bert(cls=T.BertModel, **more):
    return cls(T.BertConfig(vocab_size=60, max_position_embeddings=32, **TINY, **more)).eval()


def quantizes(model, example):
    """Calibrated without data, the model runs on what its example is like."""
    mpq = HubMPQ.from_module(model, example)
    mpq.apply_policy("W4A8")
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    with torch.no_grad():
        mpq.model(*args, **kwargs)
    return synthetic_batch(model, example)


def test_types_of_tokens_stay_below_their_number():
    made = quantizes(bert(), {"input_ids": IDS, "token_type_ids": torch.zeros_like(ONES), "attention_mask": ONES})
    assert made["token_type_ids"].unique().tolist() == [0, 1]
    assert made["input_ids"].shape == (BATCH, 10)
    assert made["input_ids"].max() < 60
    assert len(made["input_ids"].unique()) > 30
    assert torch.equal(made["attention_mask"], ONES.expand(BATCH, -1))


def test_positions_and_masks_stay():
    places = torch.arange(3, 13)[None]
    for mask in (torch.ones(1, 10), torch.ones(1, 10, dtype=torch.bool), torch.zeros(1, 1, 10, 10)):
        made = quantizes(bert(), {"input_ids": IDS, "position_ids": places, "attention_mask": mask})
        assert torch.equal(made["position_ids"], places.expand(BATCH, -1))
        assert torch.equal(made["attention_mask"], mask.expand(BATCH, *mask.shape[1:]))
        assert made["attention_mask"].dtype == mask.dtype


def test_a_decoder_reads_tokens_and_the_end_stays_where_it_is():
    config = T.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, eos_token_id=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    ids = torch.cat([IDS[:, 1:], torch.tensor([[2]])], 1)
    made = quantizes(T.BartForSequenceClassification(config).eval(), {"input_ids": ids, "decoder_input_ids": IDS})
    assert (made["input_ids"] == 2).nonzero()[:, 1].tolist() == [9] * BATCH  # the classifier reads the one end
    assert made["decoder_input_ids"].max() < 60
    assert len(made["decoder_input_ids"].unique()) > 30
    assert not torch.equal(made["decoder_input_ids"], made["input_ids"])


class Words(nn.Module):
    """Everything positional: tokens, positions, a kind that is looked up after a cast, a mask, a weight a sample."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(40, 8), nn.Embedding(12, 8), nn.Parameter(torch.ones(3, 8))
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, places, tokens, kind, keep, weight, steps):
        x = self.words(tokens) + self.places(places) + self.kinds.index_select(0, kind.long().flatten())[:, None]
        return self.head(self.body(x * keep[..., None]).mean(1)) * weight[:, None] * steps


def test_tables_tell_what_a_number_means_without_any_name():
    keep = torch.tensor([[1.0, 1, 1, 0, 1, 1]])
    tokens = torch.tensor([[7, 3, 39, 0, 2, 2]])
    example = (torch.arange(6)[None], tokens, torch.tensor([[1]], dtype=torch.int32), keep, torch.ones(1), 4)
    made = quantizes(Words().eval(), example)
    assert list(made) == ["places", "tokens", "kind", "keep", "weight", "steps"]
    assert torch.equal(made["places"], torch.arange(6).expand(BATCH, -1))
    assert made["tokens"].shape == (BATCH, 6)
    assert 20 < made["tokens"].max() < 40
    assert made["kind"].dtype == torch.int32
    assert 1 < len(made["kind"].unique()) <= 3 > made["kind"].max()
    assert torch.equal(made["keep"], keep.expand(BATCH, -1))
    assert torch.equal(made["weight"], torch.ones(BATCH))
    assert made["steps"] == 4


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(30, 8), nn.Linear(8, 3)
        self.register_buffer("map", torch.arange(50)[None] % 30)

    def forward(self, raw):
        return self.head(self.bag(self.map.expand(len(raw), -1).gather(1, raw.clone())))


def test_any_way_to_look_up_is_seen():
    made = synthetic_batch(Bags(), (torch.tensor([[1, 49, 2, 30]]),))
    assert made.shape == (BATCH, 4)
    assert 30 < made.max() < 50
    bag = nn.EmbeddingBag(30, 8)
    assert 4 < len(synthetic_batch(bag, (torch.tensor([[1, 2, 3]]),)).unique()) <= 30


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.m, self.h = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x, y):
        return self.h(torch.relu(self.m(torch.relu(self.a(x) + self.b(y)))))


def test_two_positional_inputs_are_noise_even_where_the_example_is_blank():
    for fill in (torch.zeros, torch.ones):
        made = quantizes(Two(), (fill(1, 8), fill(1, 4)))
        assert {k: tuple(v.shape) for k, v in made.items()} == {"x": (BATCH, 8), "y": (BATCH, 4)}
        assert all(0.5 < v.std() < 1.5 for v in made.values())
    assert synthetic_batch(nn.Linear(8, 4), (torch.zeros(1, 8),)).shape == (BATCH, 8)


@pytest.mark.parametrize("mask", [torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, float("-inf")), None])
def test_an_input_without_a_batch_axis_keeps_its_shape(mask):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.qk, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, tokens, bias):
            x = self.words(tokens)
            return self.head((self.qk(x) @ x.mT + (0 if bias is None else bias)).softmax(-1) @ x)

    tokens = torch.randint(30, (1, 6))
    made = quantizes(Attends().eval(), (tokens, mask))
    assert made["tokens"].shape == ((BATCH if mask is None else 1), 6)
    assert made["bias"] is None if mask is None else torch.equal(made["bias"], mask)


def test_whole_numbers_that_nothing_looks_up_stay():
    model = bert(T.BertForSequenceClassification, num_labels=3)
    labels = torch.tensor([2])
    made = synthetic_batch(model, {"input_ids": IDS, "attention_mask": ONES, "labels": labels})
    assert made["labels"].tolist() == [2] * BATCH
    before = torch.get_rng_state()
    first, again, other = (synthetic_batch(model, {"input_ids": IDS}, seed)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_corners_of_boxes_stay():
    config = T.LayoutLMConfig(vocab_size=60, max_position_embeddings=32, max_2d_position_embeddings=64, **TINY)
    boxes = torch.tensor([[[1, 2, 30, 40]] * 10])
    made = quantizes(T.LayoutLMModel(config).eval(), {"input_ids": IDS.flip(1), "bbox": boxes})
    assert torch.equal(made["bbox"], boxes.expand(BATCH, -1, -1))
    assert len(made["input_ids"].unique()) > 30


class Span(nn.Module):
    """Looks up where a span starts by indexing, and how long it is."""

    def __init__(self):
        super().__init__()
        self.places, self.lengths, self.head = nn.Embedding(20, 8), nn.Parameter(torch.ones(12, 8)), nn.Linear(8, 3)

    def forward(self, x, span):
        start, end = span.unbind(-1)
        return self.head(x + self.places(start) + self.lengths[(end - start).clamp(min=-30)])


def test_numbers_that_depend_on_each_other_stay_and_noise_is_drawn():
    made = quantizes(Span(), {"x": torch.zeros(1, 8), "span": torch.tensor([[3, 5]])})
    assert torch.equal(made["span"], torch.tensor([[3, 5]]).expand(BATCH, -1))
    assert made["x"].std() > 0.5


class OneSample(nn.Module):
    def __init__(self, way, norm):
        super().__init__()
        self.way, self.conv, self.head = way, nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()

    def forward(self, x):
        return self.head(self.norm(self.conv(self.way(x))).mean((0, 2, 3)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("way", "shape"),
    [(lambda x: x[None], (3, 8, 8)), (lambda x: x.flatten().view(1, 3, 8, 8), (1, 3, 8, 8))],
)
def test_a_net_that_makes_the_batch_axis_itself_gets_the_shape_of_the_example(way, shape, norm):
    made = quantizes(OneSample(way, norm).eval(), (torch.zeros(shape),))
    assert made.shape == shape
    assert 0.5 < made.std() < 3


class OfImages(OneSample):
    def forward(self, images):
        return super().forward(torch.stack(images))


@pytest.mark.parametrize("count", [1, 2])
def test_a_list_of_images_is_one_input(count):
    made = quantizes(OfImages(lambda x: x, False).eval(), ([torch.zeros(3, 8, 8)] * count,))
    ((images,),) = made
    assert [tuple(x.shape) for x in images] == [(3, 8, 8)] * count
    assert all(0.5 < x.std() < 1.5 for x in images)


class Any2(Two):
    def forward(self, *xs):
        return super().forward(*xs)


def test_inputs_without_names_are_one_tuple():
    ((first, second),) = quantizes(Any2(), (torch.zeros(1, 8), torch.zeros(1, 4)))
    assert first.shape == (BATCH, 8)
    assert second.shape == (BATCH, 4)


def test_a_dict_may_be_the_one_input():
    class OfDict(Two):
        def forward(self, batch):
            return super().forward(batch["a"], batch["b"])

    made = synthetic_batch(OfDict(), ({"a": torch.zeros(1, 8), "b": torch.zeros(1, 4)},))
    assert isinstance(made, tuple)
    assert {k: tuple(v.shape) for k, v in made[0].items()} == {"a": (BATCH, 8), "b": (BATCH, 4)}
    assert made[0]["a"].std() > 0.5


def test_torchscript_has_no_names():
    script = torch.jit.trace(Two(), (torch.zeros(1, 8), torch.zeros(1, 4)))
    ((first, second),) = synthetic_batch(script, (torch.zeros(1, 8), torch.zeros(1, 4)))
    assert first.shape == (BATCH, 8)
    assert second.shape == (BATCH, 4)


def test_an_input_on_which_only_the_example_runs_is_the_example():
    class Picky(nn.Linear):
        def forward(self, x):
            if len(x) > 1 or not (x == 3).all():
                raise ValueError("three")
            return super().forward(x)

    assert torch.equal(synthetic_batch(Picky(4, 2), (torch.full((1, 4), 3.0),)), torch.full((1, 4), 3.0))


def test_modes_of_layers_are_left_as_they_were():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).train()
    net[1].eval()
    synthetic_batch(net, (torch.zeros(1, 3, 8, 8),))
    assert [m.training for m in net] == [True, False, True]
