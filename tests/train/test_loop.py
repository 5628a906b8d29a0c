import math
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hub_mpq.errors import HubMPQError, InvalidArgument, TrainingDiverged
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune, Hooks, evaluate, fit
from hub_mpq.train.checkpoint import Checkpoints
from hub_mpq.train.finetune import finetune
from hub_mpq.train.norms import reestimate_batch_norm, single_values_allowed
from hub_mpq.train.processes import make_accelerator


def hooks(**changes):
    return Finetune(
        task=Classification(), **{"lr": 1e-2, "scale_lr": 1e-3, "weight_decay": 0.0, "smoothing": 0.0, **changes}
    )


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_it_learns_and_reports(net, train, val):
    before = evaluate(net, val)["loss"]
    log = fit(net, hooks(), train, epochs=4)
    assert log.steps == 24
    assert log.samples == 384
    assert len(log.epoch_loss) == 4
    assert evaluate(net, val)["loss"] < before
    assert not net.training


def test_the_seed_alone_decides_the_order_of_a_shuffled_loader(net, data):
    import copy

    ends = []
    for seed, noise in ((1, 0), (1, 9), (2, 0)):
        torch.manual_seed(noise)
        model = copy.deepcopy(net)
        fit(model, hooks(), DataLoader(data, batch_size=16, shuffle=True), steps=3, seed=seed)
        ends.append(model[0].weight.clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


class Interrupted(Finetune):
    """Raises what Ctrl-C raises, after a given step."""

    stop_after = 5

    def after_step(self, model, step):
        if step + 1 == self.stop_after:
            import signal

            signal.raise_signal(signal.SIGINT)


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(net, data, tmp_path):
    import copy

    def loader():
        return DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))

    twin = copy.deepcopy(net)
    fit(net, hooks(), loader(), steps=14, seed=3)
    broken = Interrupted(task=Classification(), lr=1e-2, scale_lr=1e-3, weight_decay=0.0, smoothing=0.0)
    with pytest.raises(KeyboardInterrupt, match="step 5"):
        fit(twin, broken, loader(), steps=14, seed=3, checkpoint_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    fit(twin, hooks(), loader(), steps=14, seed=3, checkpoint_dir=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(state(net).values(), state(twin).values(), strict=True))


def test_the_average_survives_an_interruption(net, data, tmp_path, monkeypatch):
    import copy

    def loader():
        return DataLoader(data, batch_size=16, shuffle=True)

    options = {"steps": 9, "lr": 1e-2, "ema": 0.9, "reestimate_norms": False, "checkpoint_dir": tmp_path}
    whole, broken = copy.deepcopy(net), copy.deepcopy(net)
    finetune(whole, loader(), **{**options, "checkpoint_dir": None})
    plain = Finetune.after_step

    def interrupted(self, model, step):
        plain(self, model, step)
        if step == 4:
            import signal

            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Finetune, "after_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, loader(), **options)
    monkeypatch.setattr(Finetune, "after_step", plain)
    again = copy.deepcopy(net)
    finetune(again, loader(), **options, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(state(whole).values(), state(again).values(), strict=True))


def test_several_passes_add_their_gradients(train):
    class Twice(Finetune):
        passes = 2

        def losses(self, model, batch, rng):
            for _ in range(2):
                yield self.loss(model, batch), None

    seen = []

    class Watch(Twice):
        def before_step(self, model, step):
            seen.append(model[-1].weight.grad.clone())

    class WatchOnce(Finetune):
        def before_step(self, model, step):
            seen.append(model[-1].weight.grad.clone())

    labels = next(iter(train))[1]
    for kind in (Watch, WatchOnce):
        twin = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        nn.init.constant_(twin[1].weight, 0.01)
        nn.init.zeros_(twin[1].bias)
        still = kind(task=Classification(), lr=0.0, scale_lr=0.0, weight_decay=0.0, smoothing=0.0)
        fit(twin, still, [(torch.ones(len(labels), 1, 8, 8), labels)], steps=1)
    torch.testing.assert_close(seen[0], 2 * seen[1])


def test_nan_stops_names_the_step_and_keeps_the_checkpoint(net, train, tmp_path):
    class Poison(Finetune):
        def after_step(self, model, step):
            if step == 3:  # a checkpoint is due right after this step, and must not be written
                with torch.no_grad():
                    model[0].weight.fill_(math.nan)

    bad = Poison(task=Classification(), lr=1e-3, scale_lr=1e-3, weight_decay=0.0, smoothing=0.0)
    with pytest.raises(TrainingDiverged, match=r"step 3.*step-00000002") as caught:
        fit(net, bad, train, steps=10, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert caught.value.step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    with pytest.raises(TrainingDiverged, match=r"step 0.*no checkpoint"):
        fit(net, bad, train, steps=10)


@pytest.mark.parametrize("loader", [[], DataLoader(TensorDataset(torch.zeros(0, 1)), batch_size=2)])
def test_empty_data_are_refused(net, loader):
    with pytest.raises(InvalidArgument, match="empty"):
        fit(net, hooks(), loader, epochs=1)
    with pytest.raises(InvalidArgument, match="empty"):
        evaluate(net, loader)


def test_labels_that_do_not_fit_are_refused(net):
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(InvalidArgument, match="no labels"):
        Classification().run(net, x)
    with pytest.raises(InvalidArgument, match="label 9 is out of range"):
        Classification().run(net, (x, torch.tensor([0, 9])))
    with pytest.raises(InvalidArgument, match="out of range"):
        evaluate(net, [(x, torch.tensor([0, 9]))])
    with pytest.raises(InvalidArgument, match="no labels"):
        evaluate(net, [x])


def test_share_of_the_data(net, train):
    assert fit(net, hooks(), train, epochs=2, share=0.5).steps == 6
    with pytest.raises(InvalidArgument, match="share"):
        fit(net, hooks(), train, share=0)


def test_global_random_state_is_not_touched(net, data):
    torch.manual_seed(7)
    random.seed(7)
    want = (torch.rand(1), random.random())
    torch.manual_seed(7)
    random.seed(7)
    loader = DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))
    fit(net, hooks(), loader, steps=3)
    assert (torch.rand(1), random.random()) == want


def test_distillation_needs_no_labels_and_comes_closer(net, data):
    import copy

    student = copy.deepcopy(net)
    with torch.no_grad():
        student[9].weight.mul_(0.5)
    images = [data.tensors[0][i : i + 16] for i in range(0, 96, 16)]
    before = evaluate(student, images, reference=net)["fidelity_db"]
    finetune(student, images, teacher=net, steps=60, lr=1e-3)
    assert evaluate(student, images, reference=net)["fidelity_db"] > before + 3
    with pytest.raises(InvalidArgument, match="float model"):
        finetune(student, images, steps=1)


def test_ema_follows_the_weights(net, train):
    import copy

    start, plain = copy.deepcopy(net), copy.deepcopy(net)
    finetune(plain, train, steps=10, lr=1e-2, reestimate_norms=False)
    finetune(net, train, steps=10, lr=1e-2, ema=0.9, reestimate_norms=False)

    def gap(model):
        return (model[0].weight - start[0].weight).norm()

    assert 0 < gap(net) < gap(plain)


def test_batch_norm_reestimation_is_the_plain_average(net, val):
    batches = list(val)
    assert reestimate_batch_norm(net, batches) == 3
    x = torch.cat([b[0] for b in batches])
    torch.testing.assert_close(net[1].running_mean, net[0](x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert net[1].momentum == 0.1
    before = net[1].running_mean.clone()
    assert reestimate_batch_norm(net, []) == 0
    assert torch.equal(net[1].running_mean, before)


def test_a_torn_checkpoint_is_never_picked_and_a_full_disk_keeps_the_last(tmp_path, monkeypatch):
    accelerator = make_accelerator(cpu=True)
    store = Checkpoints(tmp_path, accelerator)
    store.save(3)
    (tmp_path / "partial-00000009").mkdir()
    assert store.last.name == "step-00000003"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full)
    with pytest.raises(Exception, match=r"No space left.*step-00000003"):
        store.save(6)
    assert store.last.name == "step-00000003"


def test_folders_of_others_beside_the_states_stay(tmp_path):
    for name in ("partial-results", "step-00000006", "step-00000099"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    store = Checkpoints(tmp_path, make_accelerator(cpu=True))
    assert store.last is None
    store.save(3)
    store.save(4)
    with pytest.raises(HubMPQError, match="step-00000006 was not written by hub-mpq"):
        store.save(6)
    assert store.last.name == "step-00000004"
    assert len(list(tmp_path.glob("*/mine"))) == 3


def test_hooks_default_to_nothing():
    assert Hooks().after_epoch(nn.Identity(), 0) is False


def test_a_stream_needs_steps_and_then_runs(net, data):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

    stream = DataLoader(Stream(), batch_size=16)
    assert fit(net, hooks(), stream, steps=3).steps == 3
    with pytest.raises(InvalidArgument, match="steps="):
        fit(net, hooks(), stream, epochs=1)


def test_an_average_leaves_integers_alone(net, train):
    from hub_mpq import adapters
    from hub_mpq.nn.quantize import quantize_with_lsq

    graph = adapters.from_module(net, torch.zeros(1, 1, 8, 8)).graph
    quantize_with_lsq(net, graph, {"3": ((4,), (8,))}, per_channel=True)
    for value in (11, 22, 121):
        net[3].input_quantizer.zero_points.fill_(value)
        finetune(net, train, steps=6, lr=1e-4, ema=0.9999, reestimate_norms=False)
        assert net[3].input_quantizer.zero_point == value


class Two(nn.Module):
    """Two norms, of which one reads [N, C] and one [N, C, 1, 1]."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(6), nn.BatchNorm2d(6)
        for norm in (self.a, self.b):  # mean 0 and variance 1 would be a folded norm
            norm.running_mean.fill_(0.5)

    def forward(self, x):
        return self.a(x) + self.b(x[:, :, None, None])[:, :, 0, 0]


@pytest.mark.parametrize("sizes", [(8, 8, 1), (1, 8, 8), (8, 2, 7), (3, 1, 1, 12), (17,)])
def test_batch_norm_reestimation_is_that_of_all_samples_at_once(sizes):
    x = torch.randn(17, 6, generator=torch.Generator().manual_seed(0)) * 3 + torch.arange(17.0)[:, None]
    net = Two()
    assert reestimate_batch_norm(net, x.split(sizes)) == len(sizes)
    for norm in (net.a, net.b):
        torch.testing.assert_close(norm.running_mean, x.mean(0))
        torch.testing.assert_close(norm.running_var, x.var(0))
        assert norm.momentum == 0.1
        assert not norm._forward_pre_hooks
        assert not norm._forward_hooks


def test_tiny_activations_have_their_own_variance():
    x = torch.randn(17, 6, generator=torch.Generator().manual_seed(0)) * 1e-12
    net = Two()
    reestimate_batch_norm(net, x.split(8))
    torch.testing.assert_close(net.a.running_var, x.var(0), rtol=1e-4, atol=0)


def test_statistics_that_nothing_renews_stay():
    net = nn.ModuleDict({"used": nn.BatchNorm1d(3), "idle": nn.BatchNorm1d(3)})
    for norm in net.values():
        norm.running_mean.fill_(0.5)
    net.forward = lambda x: net["used"](x)
    assert reestimate_batch_norm(net, [torch.randn(8, 3)]) == 1
    assert net["idle"].running_mean.tolist() == [0.5] * 3
    assert net["used"].running_mean.ne(0.5).all()
    before = net["used"].running_mean.clone()
    assert reestimate_batch_norm(net, [torch.randn(1, 3)]) == 1, "one value has no variance"
    assert torch.equal(net["used"].running_mean, before)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.LayerNorm(6)])
def test_a_last_batch_of_one_sample_trains_too(norm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), norm, nn.GELU(), nn.Linear(6, 3))
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)) for n in (8, 1)]
    log = fit(net, hooks(), batches[:1], steps=1)
    seen = None if not isinstance(norm, nn.BatchNorm1d) else norm.running_mean.clone()
    before = net[0].weight.clone()
    log = fit(net, hooks(), batches[1:], steps=1)
    assert log.samples == 1
    assert not torch.equal(net[0].weight, before), "it has a gradient"
    if seen is not None:
        assert torch.equal(norm.running_mean, seen), "and no statistics"
        assert not norm._forward_pre_hooks
    assert math.isfinite(finetune(net, batches, epochs=1).epoch_loss[0])


def test_a_norm_is_in_training_again_after_a_single_value_even_if_it_fails():
    norm = nn.BatchNorm1d(3)
    net = nn.Sequential(norm, nn.Linear(3, 2))
    with single_values_allowed(net):
        with pytest.raises(RuntimeError):
            norm(torch.zeros(1, 5))
        assert norm.training
        assert torch.equal(norm(torch.zeros(1, 3)), norm.eval()(torch.zeros(1, 3)))
