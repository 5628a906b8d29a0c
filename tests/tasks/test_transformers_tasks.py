"""Each model of transformers has its task, whose loss is the one that the model computes itself."""

from __future__ import annotations

import sys
from collections import UserDict
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers as T

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.tasks import Classification, Detection, task_of
from hub_mpq.train import Finetune, evaluate

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 8}


def bert(kind, **more):
    return getattr(T, kind)(T.BertConfig(**SIZES, max_position_embeddings=16, **more))


def gpt2(kind="GPT2LMHeadModel"):
    return getattr(T, kind)(T.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def t5():
    return T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def segformer():
    sizes = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    return T.SegformerForSemanticSegmentation(
        T.SegformerConfig(**sizes, decoder_hidden_size=8, image_size=32, num_labels=4)
    )


def clip():
    text = {**SIZES, "max_position_embeddings": 8, "eos_token_id": 2}
    return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config={**VISION, "image_size": 16}, projection_dim=8))


def draw():
    return torch.Generator().manual_seed(0)


IDS = torch.randint(3, 40, (4, 9), generator=draw())
MASK = (torch.arange(9) < torch.tensor([[9], [7], [5], [9]])).long()
TEXT = {"input_ids": IDS, "attention_mask": MASK}
WORDS = IDS.masked_fill(MASK == 0, -100)
IMAGES = torch.randn(4, 3, 16, 16, generator=draw())
MAPS = torch.randint(0, 4, (4, 32, 32), generator=draw())
MAPS[:, :5] = 255

CASES = {
    "classification": (lambda: bert("BertForSequenceClassification", num_labels=3), TEXT, torch.tensor([0, 2, 1, 1])),
    "regression": (lambda: bert("BertForSequenceClassification", num_labels=1), TEXT, torch.tensor([0.5, 2.0, -1, 1])),
    "multi-label": (
        lambda: bert("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        TEXT,
        torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]),
    ),
    "token-classification": (
        lambda: bert("BertForTokenClassification", num_labels=5),
        TEXT,
        (IDS % 5).masked_fill(MASK == 0, -100),
    ),
    "masked-lm": (lambda: bert("BertForMaskedLM"), TEXT, IDS.masked_fill(IDS % 3 != 0, -100)),
    "causal-lm": (gpt2, TEXT, WORDS),
    "seq2seq-lm": (t5, TEXT, WORDS),
    "question-answering": (
        lambda: bert("BertForQuestionAnswering"),
        TEXT,
        {"start_positions": torch.tensor([0, 3, 2, 1]), "end_positions": torch.tensor([4, 4, 3, 1])},
    ),
    "segmentation": (segformer, {"pixel_values": torch.randn(4, 3, 32, 32, generator=draw())}, MAPS),
    "contrastive": (clip, {"input_ids": IDS[:, :8], "pixel_values": IMAGES}, {"return_loss": True}),
    "own": (
        lambda: bert("BertForPreTraining"),
        TEXT,
        {"labels": WORDS, "next_sentence_label": torch.tensor([0, 1, 1, 0])},
    ),
}


@pytest.fixture(scope="module")
def models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: build().eval() for name, (build, _, _) in CASES.items()}


def batch_of(name):
    _, inputs, labels = CASES[name]
    return {**inputs, **(labels if isinstance(labels, dict) else {"labels": labels})}


@pytest.mark.parametrize("name", CASES)
def test_its_loss_is_the_models_own(models, name):
    batch = batch_of(name)
    task = task_of(None, models[name], batch)
    assert task.name == name
    with torch.no_grad():
        torch.testing.assert_close(task.run(models[name], batch)[0], models[name](**batch).loss)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"contrastive", "own"}))
def test_figures_do_not_depend_on_how_samples_are_batched(models, name):
    batch = batch_of(name)
    task = task_of(None, models[name], batch)

    def figures(size):
        sums = {}
        for i in range(0, 4, size):
            part = {k: v[i : i + size] for k, v in batch.items()}
            with torch.no_grad():
                output = task.forward(models[name], part, labelled=True)
                found = task.metrics(output, task.labels(part), task.samples(part))
            for key, (value, count) in found.items():
                before = sums.get(key, (0.0, 0.0))
                sums[key] = (before[0] + value, before[1] + count)
        return task.figures(sums)

    whole = figures(4)
    assert figures(1) == pytest.approx(whole, rel=1e-4)
    assert figures(3) == pytest.approx(whole, rel=1e-4)
    with torch.no_grad():
        assert whole["mse" if name == "regression" else "loss"] == pytest.approx(
            float(models[name](**batch).loss), rel=1e-4
        )


@pytest.mark.parametrize("name", sorted(set(CASES) - {"contrastive", "own", "regression"}))
def test_sampled_labels_are_drawn_from_the_models_distribution(models, name):
    """The expected loss under drawn labels is the entropy of the output; and they fit the task's own loss."""
    batch = batch_of(name)
    task = task_of(None, models[name], batch)
    with torch.no_grad():
        output = task.forward(models[name], batch)
    generator = torch.Generator().manual_seed(1)
    drawn = [float(task.loss(output, task.sample(output, generator))) for _ in range(60)]
    head = task.head(output) if name != "question-answering" else task.logits(output)
    if name == "multi-label":
        p = head.sigmoid()
        entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    else:
        logits = task.logits(output)
        kept = logits[:, :-1] if name == "causal-lm" else logits  # the last word has no next one
        entropy = -(kept.softmax(-1) * kept.log_softmax(-1)).sum(-1).mean()
    assert sum(drawn) / len(drawn) == pytest.approx(float(entropy), rel=0.03)


def test_an_answer_behind_the_text_does_not_count(models):
    model = models["question-answering"]
    labels = {"start_positions": torch.tensor([0, 3, 2, 20]), "end_positions": torch.tensor([4, 4, 3, 1])}
    task = task_of(None, model, {**TEXT, **labels})
    with torch.no_grad():
        values, counted = task.item_loss(model(**TEXT), labels)
        found = task.metrics(model(**TEXT), labels, 4)
    assert counted.tolist() == [[True, True], [True, True], [True, True], [False, True]]
    assert found["loss"][1] == 7
    assert found["exact_match"][1] == 3
    assert float(values[3, 0]) == 0


def test_a_regression_has_no_distribution(models):
    task = task_of("regression", models["regression"])
    assert task.sample(task.forward(models["regression"], TEXT), draw()) is None


@pytest.mark.parametrize("name", CASES)
def test_all_results_are_targets_and_a_model_does_not_diverge_from_itself(models, name):
    task = task_of(name, models[name])
    batch = CASES[name][1] if name != "seq2seq-lm" else batch_of(name)
    with torch.no_grad():
        output = task.forward(models[name], batch)
        assert float(task.distillation(output, output, batch)) == pytest.approx(0, abs=1e-6)
    wanted = {
        "question-answering": {"start_logits", "end_logits"},
        "own": {"prediction_logits", "seq_relationship_logits"},
        "contrastive": {"logits_per_image", "text_embeds", "image_embeds"},
    }
    assert set(task.targets(output)) == wanted.get(name, {"logits"})


def test_padding_does_not_count_in_a_divergence(models):
    task = task_of(None, models["causal-lm"])
    logits = torch.zeros(4, 9, 40)
    other = logits.clone()
    other[:, :, 0] += 5 * (1 - MASK)  # differs at padded places alone
    assert float(task.distillation(other, logits, TEXT)) == 0
    assert float(task.distillation(other, logits, {"input_ids": IDS})) > 0.1
    embedding = task_of("embedding", models["causal-lm"])
    assert float(embedding.distillation(other, logits + 0.1, TEXT)) == pytest.approx(
        float(embedding.distillation(logits, logits + 0.1, TEXT))
    )


@pytest.mark.parametrize(
    ("kind", "more", "name"),
    [
        ("BertForMultipleChoice", {"num_labels": 1}, "own"),
        ("BertForNextSentencePrediction", {}, "own"),
        ("BertModel", {}, "embedding"),
        ("BertLMHeadModel", {"is_decoder": True}, "causal-lm"),
        ("BertForSequenceClassification", {"num_labels": 3, "problem_type": "regression"}, "regression"),
    ],
)
def test_the_class_and_its_config_say_the_task(kind, more, name):
    assert task_of(None, bert(kind, **more)).name == name


def test_two_towers_without_return_loss_are_compared_by_their_outputs(models):
    assert task_of(None, models["contrastive"], CASES["contrastive"][1]).name == "embedding"


def test_labels_of_several_classes_as_floats_are_multi_label_or_refused(models):
    """A head without problem_type: transformers takes its binary cross-entropy for any float labels, even numbers."""
    several = {**TEXT, "labels": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])}
    assert task_of(None, models["classification"], several).name == "multi-label"
    one_hot = {**TEXT, "labels": torch.eye(3)[[0, 1, 2, 0]]}
    with pytest.raises(InvalidArgument, match="task='classification' or task='multi-label'"):
        task_of(None, models["classification"], one_hot)


def test_a_mask_is_not_trained_as_labels():
    model = bert("BertForTokenClassification", num_labels=2)
    for batch in ((IDS, MASK, IDS % 2), (IDS, MASK)):
        with pytest.raises(InvalidArgument, match=r"parts|attention mask"):
            task_of(None, model, batch).labels(batch)
    nested = ((IDS, MASK), IDS % 2)
    task = task_of(None, model, nested)
    args, kwargs = task.inputs(nested)
    assert len(args) == 2
    assert torch.equal(args[1], MASK)
    assert not kwargs
    assert torch.equal(task.labels(nested), IDS % 2)


def test_a_column_that_the_model_does_not_take_is_named(models):
    batch = {**TEXT, "labels": torch.zeros(4, dtype=torch.long), "idx": torch.arange(4)}
    with pytest.raises(InvalidArgument, match=r"unexpected 'idx' in the batch: BertForSequenceClassification takes"):
        task_of(None, models["classification"], batch)
    named = task_of(Classification(label_keys=["idx"]), models["classification"])
    assert torch.equal(named.labels({**TEXT, "idx": torch.arange(4)}), torch.arange(4))


def test_detection_uses_the_models_loss_and_all_its_outputs():
    config = T.YolosConfig(**VISION, image_size=[16, 16], num_detection_tokens=5, num_labels=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T.YolosForObjectDetection(config).eval()
    labels = [
        {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])},
        {"class_labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4, generator=draw()) / 2 + 0.1},
    ]
    batch = {"pixel_values": IMAGES[:2], "labels": labels}
    task = task_of(None, model, batch)
    assert task.name == "detection"
    with torch.no_grad():
        loss, output = task.run(model, batch)
        torch.testing.assert_close(loss, model(**batch).loss)
    assert set(task.targets(output)) == {"logits", "pred_boxes"}
    mpq = HubMPQ.from_module(model, {"pixel_values": IMAGES[:1]})
    found = mpq.evaluate([batch])
    assert found["task"] == "detection"
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert 0 <= found["map"] <= found["map_50"] <= 100


def test_the_average_precision_is_that_of_the_boxes():
    """Three boxes of two images are found with the right class, one at another place; "no object" is the last logit."""
    logits = torch.full((2, 3, 4), -9.0)
    boxes = torch.rand(2, 3, 4, generator=draw()) / 4 + 0.3
    classes = [[0, 2, 3], [1, 1, 3]]
    for i, row in enumerate(classes):
        for j, c in enumerate(row):
            logits[i, j, c] = 5.0
    moved = boxes[1, 1].clone()
    moved[:2] = 0.9
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": boxes[0, :2]},
        {"class_labels": torch.tensor([1, 1]), "boxes": torch.stack([boxes[1, 0], moved])},
    ]
    whole = Detection().whole()
    whole.update(SimpleNamespace(logits=logits, pred_boxes=boxes), {"labels": labels})
    # classes 0 and 2: 1; class 1: one of two found, so precision 1 up to a recall of one half (51 of 101 points)
    assert whole.compute()["map_50"] == pytest.approx(100 * (2 + 51 / 101) / 3, rel=1e-3)


def test_detection_without_torchmetrics_has_its_loss(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    assert Detection().whole() is None


class Focal(T.BertForSequenceClassification):
    """Somebody's own loss under a class name that ends like transformers' own."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None:
            out.loss = 7 * torch.nn.functional.cross_entropy(out.logits, labels)
        return out


def test_a_loss_of_somebodys_own_is_kept(models):
    focal = Focal(models["classification"].config).eval()
    weighted = gpt2().eval()
    weighted.loss_function = lambda logits, labels, **more: 7 * logits.square().mean()
    for model, name in ((focal, "classification"), (weighted, "causal-lm")):
        batch = batch_of(name)
        task = task_of(None, model, batch)
        assert task.name == "own"
        with torch.no_grad():
            loss = task.run(model, batch)[0]
            torch.testing.assert_close(loss, model(**batch).loss)
            assert float(loss) != pytest.approx(float(task_of(name, model).run(model, batch)[0]), rel=0.1)


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


class Plain(torch.nn.Module):
    """A network of no library that computes its loss when it is given labels."""

    def __init__(self, kind=dict):
        super().__init__()
        self.body, self.kind = torch.nn.Linear(3, 4), kind

    def forward(self, x, labels=None):
        logits = self.body(x)
        loss = None if labels is None else 7 * torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if self.kind is dict else logits


def test_a_network_of_no_library_may_compute_its_loss():
    net, x, y = Plain(), torch.randn(8, 3, generator=draw()), torch.arange(8) % 4
    for batch in ((x, y), {"x": x, "labels": y}):
        task = task_of(None, net, batch)
        assert task.name == "own"
        torch.testing.assert_close(task.run(net, batch)[0], net(x, y)["loss"])
    with pytest.raises(InvalidArgument, match="Plain computes no loss from its labels"):
        task_of(None, Plain(list), (x, y)).run(Plain(list), (x, y))
    with pytest.raises(InvalidArgument, match="labels, which it does not accept"):
        HubMPQ.from_module(torch.nn.Sequential(torch.nn.Linear(3, 4)), x[:1], task="own").evaluate([(x, y)])


def test_a_model_in_pefts_wrapper_keeps_its_task(models):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert("BertForQuestionAnswering"), LoraConfig(target_modules=["query"]))
    assert task_of(None, model, batch_of("question-answering")).name == "question-answering"
    own = get_peft_model(bert("BertForPreTraining"), LoraConfig(target_modules=["query"])).eval()
    for form in (dict, UserDict):  # as transformers' BatchEncoding is
        batch = form({**TEXT, **CASES["own"][2]})
        batch.pop("labels")
        with torch.no_grad():
            assert task_of("own", own).labels(batch).keys() == {"next_sentence_label"}
    assert task_of(None, own, batch_of("own")).name == "own"


def test_a_scripted_network_is_measured():
    net, x = torch.jit.trace(torch.nn.Linear(3, 4), torch.zeros(2, 3)), torch.randn(8, 3, generator=draw())
    found = evaluate(net, [(x, torch.arange(8) % 4)])
    assert found["task"] == "classification"


def test_a_model_without_a_head_has_no_labels(models):
    with pytest.raises(InvalidArgument, match="BertModel has no head"):
        task_of(None, bert("BertModel"), {**TEXT, "labels": torch.zeros(4, dtype=torch.long)})
    with pytest.raises(InvalidArgument, match="ResNet has no head"):
        task_of(None, timm.create_model("test_resnet", num_classes=0), (IMAGES, torch.zeros(4, dtype=torch.long)))


def test_keywords_that_a_forward_routes_are_inputs():
    """EncoderDecoderModel hands what it does not name to its parts; BertModel ignores it."""
    encoder, decoder = bert("BertModel"), bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    model = T.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    task = task_of(None, model, {**TEXT, "decoder_input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)})
    assert "token_type_ids" in task.inputs({**TEXT, "token_type_ids": torch.zeros_like(IDS)})[1]


def test_classes_that_a_model_masks_out_are_not_smoothed():
    logits = torch.randn(4, 6, generator=draw())
    logits[:, 4:] = torch.finfo(torch.float32).min
    labels = torch.tensor([0, 1, 2, 3])
    task = Classification()
    wanted = torch.nn.functional.cross_entropy(logits[:, :4], labels, label_smoothing=0.1)
    torch.testing.assert_close(task.loss(logits, labels, 0.1), wanted)


def test_smoothing_is_for_classification_unless_it_is_asked_for(models):
    rates = {"lr": 0.0, "scale_lr": 0.0, "weight_decay": 0.0}
    for name, smoothing in (("classification", 0.1), ("causal-lm", 0.0), ("question-answering", 0.0)):
        task = task_of(None, models[name], batch_of(name))
        assert Finetune(task=task, smoothing=None, **rates).smoothing == smoothing
        assert Finetune(task=task, smoothing=0.2, **rates).smoothing == 0.2


def test_sequences_without_their_second_half_are_refused_in_words(models):
    """An encoder-decoder without labels needs the decoder's input."""
    with pytest.raises(InvalidArgument, match="cannot be called on this batch"):
        HubMPQ.from_module(models["seq2seq-lm"], {**TEXT, "decoder_input_ids": IDS}).apply_policy("W8A8", [TEXT])


def test_losses_of_a_models_own_are_means_over_samples(models):
    """Whatever stands first in the batch, and however the labels are nested."""
    config = T.YolosConfig(**VISION, image_size=[16, 16], num_detection_tokens=5, num_labels=3)
    model = seeded(lambda: T.YolosForObjectDetection(config)).eval()
    boxes = torch.rand(3, 4, generator=draw()) / 2 + 0.1
    labels = [
        {"class_labels": torch.tensor([0, 1, 2]), "boxes": boxes},
        {"class_labels": torch.tensor([1]), "boxes": boxes[:1]},
        {"class_labels": torch.tensor([2, 2]), "boxes": boxes[1:]},
    ]
    data = [{"labels": labels[i:j], "pixel_values": IMAGES[i:j]} for i, j in ((0, 2), (2, 3))]
    with torch.no_grad():
        wanted = sum(size * float(model(**batch).loss) for size, batch in zip((2, 1), data, strict=True)) / 3
    found = HubMPQ.from_module(model, {"pixel_values": IMAGES[:1]}).evaluate(data)
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["samples"] == 3


def test_the_decoders_places_count_by_its_labels(models):
    task = task_of(None, models["seq2seq-lm"], batch_of("seq2seq-lm"))
    assert torch.equal(task.mask(batch_of("seq2seq-lm")), WORDS != -100)
    assert task.mask(TEXT) is None


def test_padding_does_not_count_in_a_probe(models):
    """Labels are drawn for real tokens alone, so more padding does not dilute the gradients."""
    model = models["token-classification"]
    task = task_of(None, model, TEXT)
    longer = {key: torch.nn.functional.pad(value, (0, 6)) for key, value in TEXT.items()}
    _, kept = task.probe(task.forward(model, longer), torch.Generator(), task.mask(longer))
    assert torch.equal(kept, longer["attention_mask"].bool())


def test_the_memory_of_xlnet_is_no_result():
    config = T.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24, num_labels=3)
    net = T.XLNetForSequenceClassification(config).eval()
    task = task_of(None, net, {**TEXT, "labels": torch.tensor([0, 2, 1, 1])})
    output = task.forward(net, TEXT)
    assert output.mems
    assert list(task.targets(output)) == ["logits"]
    values, _ = task.divergence(output, output, task.mask(TEXT))
    torch.testing.assert_close(values, torch.zeros(4))
