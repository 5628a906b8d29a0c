"""PEFT's adapters on packed bases, as QLoRA has them: they train, are saved alone, and load beside a fresh base."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from plugin_toys import build, pack

from hub_mpq import HubMPQ
from hub_mpq.core.files import PACKED
from hub_mpq.errors import HubMPQError

BATCH = torch.randint(0, 50, (8, 8), generator=torch.Generator().manual_seed(1))
TARGETS = {
    "classifier": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}


@pytest.fixture(scope="module", params=TARGETS)
def case(request, tmp_path_factory):
    """A packed folder of one kind; `kind` is its name."""
    found = pack(tmp_path_factory.mktemp(request.param), request.param)
    found.kind = request.param
    return found


def base(case, **options):
    return case.cls.from_pretrained(case.folder, **options)


def with_lora(model, kind, **options):
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": TARGETS.get(kind), "r": 4, **options}))


def labels(kind):
    return BATCH.sum(1) % 3 if kind == "classifier" else BATCH


def loss(model, kind):
    return model(input_ids=BATCH, labels=labels(kind)).loss


def train(model, kind, steps=8):
    """Train what requires gradients; returns the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(steps):
        value = loss(model.train(), kind)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=BATCH).logits


def own_state(model):
    """The state of the base inside a model with adapters, by its own names."""
    state = {k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if "lora_" not in name}


@pytest.mark.parametrize("targets", ["by name", "all-linear"])
def test_an_adapter_trains_and_loads_beside_a_fresh_base(case, targets, tmp_path):
    model = with_lora(base(case), case.kind, **({"target_modules": targets} if targets == "all-linear" else {}))
    assert torch.equal(logits(model), logits(base(case)))
    losses = train(model, case.kind)
    assert losses[-1] < losses[0] - 0.03
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name), "every adapter moves"
    fresh = base(case).state_dict()
    assert fresh.keys() == own_state(model).keys()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in own_state(model).items())
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*"))
    want = logits(model)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(case), tmp_path)), want)
    if case.kind != "classifier":  # PEFT finds the packed base by itself
        assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)), want)
    model.unload().save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / PACKED).read_bytes() == (case.folder / PACKED).read_bytes()


def test_gradients_are_those_of_the_same_model_with_quantizers(case):
    """Of adapters at the bottom too: they pass through quantized inputs straight where these are in range."""
    if case.kind == "gpt2":  # PEFT knows no transposed linear layer with quantizers, and says so
        with pytest.raises(ValueError, match=r"QuantConv1D[\s\S]* is not supported"):
            with_lora(HubMPQ.from_pretrained(case.folder).model, case.kind)
        return
    found = []
    for model in (base(case), HubMPQ.from_pretrained(case.folder).model):
        torch.manual_seed(0)
        model = with_lora(model, case.kind, init_lora_weights=False).eval()
        loss(model, case.kind).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) >= 8
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(case, reentrant):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = with_lora(base(case), case.kind, init_lora_weights=False)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(0)
        loss(model.train(), case.kind).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_by_peft_for_few_bits(case, dtype):
    prepared = peft.prepare_model_for_kbit_training(base(case, dtype=dtype))
    assert not any(p.requires_grad for p in prepared.parameters())
    losses = train(with_lora(prepared, case.kind), case.kind)
    assert losses[-1] < losses[0] - 0.02


def test_trainer_trains_adapters_and_goes_back_to_the_best(case, tmp_path):
    scores = [0.9, 0.1]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        num_train_epochs=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        gradient_checkpointing=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(BATCH, labels(case.kind), strict=True)]
    run = transformers.Trainer(
        model=with_lora(base(case), case.kind),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda _: {"score": scores.pop(0)},
    )
    run.train()
    best, last = (peft.PeftModel.from_pretrained(base(case), tmp_path / "run" / f"checkpoint-{n}") for n in (1, 2))
    assert torch.equal(logits(run.model), logits(best))
    assert not torch.equal(logits(best), logits(last))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        transformers.Trainer(model=base(case), args=arguments, train_dataset=rows)


def test_merging_is_refused_and_goes_by_the_float_model(case, tmp_path):
    """A merged adapter would be lost without a word."""
    model = with_lora(base(case), case.kind, init_lora_weights=False)
    want = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(HubMPQError, match="adapter cannot be merged"):
            merge()
        assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path)
    beside = peft.PeftModel.from_pretrained(base(case).dequantize(), tmp_path)
    want = logits(beside)
    torch.testing.assert_close(logits(beside.merge_and_unload()), want)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_takes_a_part_of_the_base_is_refused(case, start):
    with pytest.raises(HubMPQError, match="are read-only"):
        with_lora(base(case), case.kind, init_lora_weights=start)


def test_a_model_with_adapters_inside_is_not_saved_as_the_base(case, tmp_path):
    """Its layers have other names then; neither packed ones nor those with quantizers are written."""
    mpq = HubMPQ.from_pretrained(case.folder)
    models = [base(case)] if case.kind == "gpt2" else [base(case), mpq.model]
    for model in models:
        with_lora(model, case.kind)
        with pytest.raises(HubMPQError, match="unload it before saving the model"):
            model.save_pretrained(tmp_path / "out")
    if case.kind != "gpt2":
        with pytest.raises(HubMPQError, match="unload it before saving the model"):
            mpq.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["IA3Config", "OFTConfig", "AdaLoraConfig", "RandLoraConfig"])
def test_other_adapters_of_linear_layers(case, method, tmp_path):
    """They start as the base, train, load beside a fresh one, and are taken off again; merged they are not."""
    if case.kind == "gpt2" and method == "OFTConfig":
        pytest.skip("PEFT has no OFT of transposed linear layers")
    options = {"target_modules": TARGETS[case.kind]}
    options |= {"feedforward_modules": []} if method == "IA3Config" else {}
    options |= {"r": 0, "oft_block_size": 8} if method == "OFTConfig" else {}
    options |= {"total_step": 100} if method == "AdaLoraConfig" else {}
    model = peft.get_peft_model(base(case), getattr(peft, method)(**options))
    assert torch.equal(logits(model), logits(base(case)))
    train(model, case.kind)
    model.save_pretrained(tmp_path)
    want = logits(model)
    assert not torch.equal(want, logits(base(case)))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(case), tmp_path)), want)
    with pytest.raises(HubMPQError, match="are read-only"):
        model.merge_and_unload()
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(model.unload()), logits(base(case)))


def test_convolutions_and_embeddings(tmp_path):
    """LoRA of a packed Conv2d and of a packed Embedding; of those with quantizers too."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind, inputs, targets in (
        ("vit", {"pixel_values": pixels}, ["projection", "q_proj"]),
        ("bert", {"input_ids": BATCH}, ["word_embeddings", "query"]),
    ):
        case = pack(tmp_path / kind, kind)
        with torch.no_grad():
            quantized = with_lora(HubMPQ.from_pretrained(case.folder).model, kind, target_modules=targets).eval()
            assert torch.equal(quantized(**inputs).logits, base(case)(**inputs).logits)
        model = with_lora(base(case), kind, target_modules=targets)
        model(**inputs).logits.square().mean().backward()
        # the second factors; the first ones wait for these to leave zero
        moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        seconds = {n for n, _ in model.named_parameters() if "lora_B" in n}
        zeros = {n for n, p in model.named_parameters() if p.requires_grad and p.abs().sum() == 0}
        assert moved == zeros
        assert len(seconds & moved) >= 2
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / f"{kind}-adapter")
        back = peft.PeftModel.from_pretrained(base(case), tmp_path / f"{kind}-adapter").eval()
        with torch.no_grad():
            assert torch.equal(back(**inputs).logits, model.eval()(**inputs).logits)
            assert not torch.equal(back(**inputs).logits, base(case)(**inputs).logits)


def test_a_float_head_trains_beside_a_packed_body(tmp_path):
    """As PEFT has it for classification: the head is saved with the adapter."""
    build("classifier")[0].save_pretrained(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float", exclude=["classifier"])
    mpq.apply_policy("W3A6")
    mpq.save_pretrained(tmp_path / "packed")
    cls = transformers.AutoModelForSequenceClassification
    model = with_lora(cls.from_pretrained(tmp_path / "packed"), "classifier", task_type="SEQ_CLS")
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    before = head.detach().clone()
    train(model, "classifier")
    assert not torch.equal(head, before)
    model.save_pretrained(tmp_path / "adapter")
    back = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "packed"), tmp_path / "adapter")
    assert torch.equal(logits(back), logits(model))
