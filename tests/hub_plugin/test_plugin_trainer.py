"""transformers' Trainer keeps its promises for quantized models: the best model, a resumed run, what it publishes."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import transformers
from plugin_toys import build, pack

from hub_mpq import HubMPQ
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.hub.plugin import MPQConfig

KINDS = ["classifier", "gpt2"]


class Rows(torch.utils.data.Dataset):
    """Sixteen texts; their labels are what the kind of model takes."""

    def __init__(self, kind):
        self.kind, self.ids = kind, torch.randint(0, 50, (16, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, k):
        ids = self.ids[k]
        return {"input_ids": ids, "labels": ids.sum() % 3 if self.kind == "classifier" else ids}


def quantized(kind, folder, level="W3A6"):
    """A model to train: put together by HubMPQ, or quantized by transformers while it loads."""
    if kind == "classifier":
        mpq = HubMPQ.from_pretrained(folder)
        mpq.apply_policy(level)
        return mpq.model
    given = {"calibration": [{"input_ids": Rows(kind).ids}]}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=MPQConfig(level, **given))


class States(transformers.TrainerCallback):
    """The state dict of the model at each save."""

    def __init__(self):
        self.at = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = copy.deepcopy(model.state_dict())


def trainer(model, kind, folder, scores=(), **options):
    """Three epochs of two steps; `scores`: what the evaluation says after each."""
    scores = list(scores)
    if scores:
        options |= {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "score"}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=3,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="epoch",
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(kind),
        eval_dataset=Rows(kind),
        compute_metrics=(lambda _: {"score": scores.pop(0)}) if scores else None,
        callbacks=[States()],
    )


def states(run):
    return next(c.at for c in run.callback_handler.callbacks if isinstance(c, States))


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=Rows("any").ids).logits


@pytest.fixture(scope="module", params=KINDS)
def ran(request, tmp_path_factory):
    """(kind, float folder, a run of which the second of three checkpoints is the best)."""
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    build(kind)[0].save_pretrained(root / "float")
    run = trainer(quantized(kind, root / "float"), kind, root / "run", scores=[0.1, 0.9, 0.3])
    run.train()
    return kind, root / "float", run


def test_the_best_model_is_in_memory_at_the_end(ran):
    """With the float weights and scales that training goes on from, and with the logits of its folder."""
    _, _, run = ran
    best, last = (run.args.output_dir + f"/checkpoint-{step}" for step in (4, 6))
    assert run.state.best_model_checkpoint == best
    assert same(run.model.state_dict(), states(run)[4])
    assert not same(run.model.state_dict(), states(run)[6])
    there = logits(run.model)
    assert torch.equal(logits(type(run.model).from_pretrained(best)), there)
    assert not torch.equal(logits(type(run.model).from_pretrained(last)), there)


def test_a_resumed_run_ends_as_the_whole_one(ran, tmp_path):
    """To the bit, in a model that was made anew, and in a copy of one."""
    kind, floats, run = ran
    model = copy.deepcopy(quantized(kind, floats)) if kind == "classifier" else quantized(kind, floats)
    again = trainer(model, kind, tmp_path, scores=[0.9, 0.3])
    again.train(resume_from_checkpoint=run.args.output_dir + "/checkpoint-2")
    assert again.state.global_step == 6
    assert sorted(states(again)) == [4, 6]
    for step in (4, 6):
        assert same(states(again)[step], states(run)[step])


def test_what_is_saved_for_others_holds_packed_weights_alone(ran, tmp_path):
    """Also where Trainer has copied model.safetensors of a checkpoint, as it does to publish while it trains."""
    _, _, run = ran
    shutil.copy(run.state.best_model_checkpoint + "/model.safetensors", tmp_path)
    run.save_model(str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(type(run.model).from_pretrained(tmp_path)), logits(run.model))


def test_float_models_do_not_take_a_checkpoint_for_their_weights(ran, tmp_path):
    kind, floats, run = ran
    shutil.copytree(floats, tmp_path / "plain")
    shutil.copy(run.state.best_model_checkpoint + "/model.safetensors", tmp_path / "plain")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        type(run.model).from_pretrained(tmp_path / "plain")
    plain = trainer(type(run.model).from_pretrained(floats), kind, tmp_path / "run")
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.train(resume_from_checkpoint=run.state.best_model_checkpoint)


def test_a_checkpoint_of_other_widths_is_refused(ran, tmp_path):
    kind, floats, run = ran
    other = trainer(quantized(kind, floats, "W4A6"), kind, tmp_path)
    with pytest.raises(InvalidArgument, match="different policy"):
        other.train(resume_from_checkpoint=run.state.best_model_checkpoint)


def test_float_weights_in_a_checkpoints_place_are_not_replaced(tmp_path):
    model = pack(tmp_path / "case", "classifier").mpq.model
    shutil.copytree(tmp_path / "case" / "float", tmp_path / "checkpoint-2")
    with pytest.raises(HubMPQError, match=r"checkpoint-2 holds model\.safetensors"):
        model.save_pretrained(tmp_path / "checkpoint-2")
