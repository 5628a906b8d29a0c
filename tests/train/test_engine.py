"""Each option changes what it should, and no numbers beyond its own tolerance."""

from __future__ import annotations

import copy
import json
import math

import pytest
import timm
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.core import Candidates, Engine
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.nn.banks import add_banks
from hub_mpq.nn.calibrate import sample_inputs
from hub_mpq.quantizers import LSQ
from hub_mpq.search.limpq import LIMPQ
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune, fit
from hub_mpq.train.engine import check, synced_norms
from hub_mpq.train.finetune import finetune
from hub_mpq.train.processes import make_accelerator

X = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
MOVES = {"task": Classification(), "lr": 1e-3, "scale_lr": 1e-2, "weight_decay": 0.0, "smoothing": 0.0}


class Watched(LIMPQ):
    """Keeps the gradients of a step, and what the layers gave."""

    def attach(self, model, *args):
        super().attach(model, *args)
        self.outputs, self.inputs, self.grads = [], [], {}
        for module in self.layers.values():
            module.register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        self.inputs.append(args[0])
        self.outputs.append(output)

    def before_step(self, model, step):
        self.compiled = {m.compiled for m in model.modules() if isinstance(m, LSQ)}
        self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trained(net, batches, engine, example=X, **options):
    """(strategy, model, log) of two steps with widths 2 and 4."""
    mpq = HubMPQ.from_module(net, example)
    strategy, model = Watched(**options), copy.deepcopy(net)
    strategy.loss = Finetune(**MOVES)
    norms = {"4": "3", "7": "6"} if isinstance(net, nn.Sequential) else {}
    strategy.attach(model, mpq.graph, {x.name: Candidates.of([2, 4]) for x in mpq.graph.searched}, norms)
    strategy.calibrate(model, batches, sample_inputs(model, batches[:1], Classification().forward))
    strategy.outputs.clear()
    strategy.inputs.clear()
    return strategy, model, fit(model, strategy, batches, steps=2, engine=engine)


def alike(a, b, tolerance):
    """Gradients agree within a part of each tensor's largest."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * a[name].abs().max().clamp_min(1e-6), name


def test_bf16_computes_in_bf16_and_keeps_scales_and_gradients_in_float32(net, train):
    batches = list(train)
    plain, _, log = trained(net, batches, Engine())
    strategy, model, half = trained(net, batches, Engine(bf16=True))
    assert {x.dtype for x in plain.outputs} == {torch.float32}
    assert {x.dtype for x in strategy.outputs} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {g.dtype for g in strategy.grads.values()} == {torch.float32}
    assert half.epoch_loss != log.epoch_loss
    assert half.epoch_loss == pytest.approx(log.epoch_loss, rel=2**-7)  # a mantissa of 8 bits rounds to 2^-9, often
    # outside of the training nothing is in bf16
    assert model(batches[0][0]).dtype == torch.float32


def decoder():
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, max_position_embeddings=16, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    return net, [{"input_ids": ids, "labels": ids}], {"input_ids": ids[:1]}, "model.layers"


def vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return net, [(x, torch.tensor([0, 1, 2, 0]))], x[:1], "blocks"


@pytest.mark.parametrize("make", [decoder, vit])
def test_gradient_checkpointing_computes_blocks_again_and_the_same_gradients(make):
    net, batches, example, where = make()
    plain, _, _ = trained(net, batches, Engine(), example)
    again, remade, _ = trained(net, batches, Engine(gradient_checkpointing=True), example)
    alike(plain.grads, again.grads, 1e-6)
    searched = set(again.layers)
    assert any(name.startswith(where) for name in searched)
    # a block runs once more a pass, up to the last value that the way back needs
    assert 1.7 * len(plain.outputs) < len(again.outputs) < 2 * len(plain.outputs)
    again.outputs.clear()
    remade.train()
    again.loss.loss(remade, batches[0]).backward()
    assert len(again.outputs) == len(searched), "it is off after the training"


def test_a_model_without_gradient_checkpointing_is_told(net, train):
    with pytest.raises(InvalidArgument, match="does not support gradient checkpointing"):
        fit(net, Finetune(**MOVES), train, steps=1, engine=Engine(gradient_checkpointing=True))

    def refuse(enable):
        raise AssertionError("not supported")

    model, batch = timm.create_model("test_resnet"), (torch.zeros(2, 3, 32, 32), torch.zeros(2).long())
    model.set_grad_checkpointing = refuse
    with pytest.raises(InvalidArgument, match="does not support gradient checkpointing"):
        fit(model, Finetune(**MOVES), [batch], steps=1, engine=Engine(gradient_checkpointing=True))


def test_channels_last_is_the_order_of_memory_while_training(net, train):
    batches = list(train)
    plain, _, log = trained(net, batches, Engine())
    strategy, model, other = trained(net, batches, Engine(channels_last=True))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in strategy.inputs)
    assert not all(x.is_contiguous(memory_format=torch.channels_last) for x in plain.inputs)
    assert all(p.is_contiguous() for p in model.parameters())
    assert other.epoch_loss == pytest.approx(log.epoch_loss, rel=1e-4)


def test_compile_is_asked_for_while_training_only(net, train, monkeypatch):
    from hub_mpq.quantizers import lsq

    monkeypatch.setattr(lsq, "compiler_works", lambda kind: True)
    strategy, model, _ = trained(net, list(train), Engine(compile=True))
    assert strategy.compiled == {True}
    assert not any(m.compiled for m in model.modules() if isinstance(m, LSQ))
    assert trained(net, list(train), Engine())[0].compiled == {False}
    monkeypatch.setattr(lsq, "compiler_works", lambda kind: False)
    with pytest.raises(HubMPQError, match="cannot build kernels"):
        trained(net, list(train), Engine(compile=True))


def test_synchronized_norms_keep_their_class_banks_and_activation():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), timm.layers.BatchNormAct2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    add_banks(net, ["3"], 2)
    classes, keys = [type(m) for m in net.modules()], list(net.state_dict())
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(net)(x)
    with synced_norms(net):
        assert isinstance(net[1], nn.SyncBatchNorm)
        assert isinstance(net[3], nn.SyncBatchNorm)
        assert list(net.state_dict()) == keys
        torch.testing.assert_close(net(x), expected)  # of one process: its own batch
    assert [type(m) for m in net.modules()] == classes


def test_trackers_that_are_not_there_are_told(net, train):
    with pytest.raises(HubMPQError, match="unknown tracker 'nothing'; choose jsonl"):
        fit(net, Finetune(**MOVES), train, steps=1, engine=Engine(log_with="nothing"))


def test_a_tracker_of_the_users_gets_the_losses_and_scales(net, train, tmp_path):
    from accelerate.tracking import GeneralTracker

    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def __init__(self):
            super().__init__()
            self.rows, self.over = [], False

        def log(self, values, step=None, **_):
            self.rows.append((step, values))

        def finish(self):
            self.over = True

    kept = Kept()
    mpq = HubMPQ.from_module(net, X)
    found = mpq.train_indicators(train, steps=7, candidates=[2, 4], engine=Engine(log_with=kept, log_every=3))
    assert [step for step, _ in kept.rows] == [1, 3, 6, 7]
    assert not kept.over  # the next stage logs to it, and it is the user's
    per_pass = ["loss/2 bits", "loss/4 bits", "loss/random widths"]
    for _, values in kept.rows:
        assert [name for name in values if name.startswith("loss")] == per_pass
        assert values["samples/s"] > 0
    mean = sum(sum(values[name] for name in per_pass) / 3 for _, values in kept.rows) / 4
    assert mean == pytest.approx(sum(found.provenance["epoch_loss"][:1]), rel=0.2)
    engine = Engine(log_with="jsonl", log_dir=tmp_path)
    mpq.apply_policy("W4A4", train)
    finetune(mpq.model, train, steps=2, engine=engine)
    rows = [json.loads(line) for line in (tmp_path / "fine-tune.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert math.isfinite(rows[0]["loss"])


def test_a_tracker_made_from_a_name_is_finished(net, train, monkeypatch, tmp_path):
    from accelerate import tracking

    ended = []

    class Board(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", False, None

        def __init__(self, run_name, **_):
            super().__init__()

        def log(self, values, step=None, **_):
            assert not ended

        def finish(self):
            ended.append(True)

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Board)
    fit(net, Finetune(**MOVES), train, steps=1, engine=Engine(log_with="tensorboard", log_dir=tmp_path))
    assert ended == [True]


def test_half_precision_that_needs_a_scaled_loss_is_refused():
    from types import SimpleNamespace

    with pytest.raises(InvalidArgument, match="use bf16"):
        check(Engine(), SimpleNamespace(mixed_precision="fp16", device=torch.device("cpu")))


def test_fsdp_that_would_not_be_active_is_an_error(net, train, monkeypatch):
    with pytest.raises(HubMPQError, match="fsdp needs several processes, got 1"):
        HubMPQ.from_module(net, X).train_indicators(train, steps=1, engine=Engine(fsdp=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(HubMPQError, match="plug-in is not supported"):
        make_accelerator()
