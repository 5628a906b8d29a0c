"""The whole route on toys: load, indicators, search, apply, fine-tune, save, load."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from hub_mpq import Budget, HubMPQ, Policy
from hub_mpq.core import human
from hub_mpq.core.files import PACKED
from hub_mpq.errors import HubMPQError, InfeasibleBudget, InvalidArgument, PackedFormat, PolicyMismatch
from hub_mpq.pack import read_manifest

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mpq(net):
    return HubMPQ.from_module(net, X[:1])


def test_one_call_returns_self_meets_the_budget_and_reloads_equal(mpq, net, train, val, tmp_path):
    before = copy.deepcopy(net.state_dict())
    out = mpq.quantize(
        bitops="W4A4",
        size="W4",
        train=train,
        val=val,
        steps=6,
        indicator_options={"steps": 6},
        finetune_options={"lr": 1e-3},
    )
    assert out is mpq
    assert mpq.result.status == "optimal"
    assert mpq.usage()["bitops"] <= mpq.usage("W4A4")["bitops"]
    assert mpq.usage()["size"] <= mpq.usage("W4A4")["size"]
    assert set(mpq.metrics) == {"float", "quantized"}
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "the user's network was changed"
    written = mpq.save_pretrained(tmp_path / "out")
    assert written == mpq.usage()["size"] == (tmp_path / "out" / PACKED).stat().st_size
    again = HubMPQ.from_pretrained(tmp_path / "out", module=copy.deepcopy(net))
    assert torch.equal(again(X), mpq(X))
    assert again.policy == mpq.policy
    assert again.metrics == mpq.metrics
    assert again.indicators == mpq.indicators
    assert all(str(bits) in mpq.report() for bits in mpq.policy.bits.values())
    assert "chosen on 48 samples of val" in mpq.report()
    assert "not measured" not in mpq.report()
    mpq.finetune(train, steps=1)
    lines = mpq.report().splitlines()
    assert lines[lines.index("quantized: not measured") - 1].startswith("float: task classification")


def test_indicators_serve_every_later_budget_and_report_their_movement(mpq, train):
    indicators = mpq.train_indicators(train, steps=10)
    moved = indicators.provenance["movement"]
    assert moved["weight"]["median_change"] > 0.001
    assert -1 <= moved["activation"]["rank_correlation"] <= 1
    front = mpq.pareto(points=6)
    assert len(front) > 2
    tight = mpq.search(bitops="W2A2")
    assert {str(tight.policy.bits[x.name]) for x in mpq.graph.searched} == {"W2A2"}
    assert mpq.policy is None, "search alone must not change the model"


def test_a_result_prints_its_policy_costs_and_proof(mpq, train):
    mpq.train_indicators(train, steps=0)
    found = mpq.search(bitops="W3A3")
    *layers, costs, proof = str(found).splitlines()
    assert [line.split() for line in layers] == [[name, str(bits)] for name, bits in found.policy.bits.items()]
    assert costs.startswith(f"bitops {human(found.usage['bitops'])}  size {human(found.usage['size'])}B")
    assert proof == f"optimal: objective {found.objective:.10g}, gap 0, {found.seconds:.3f} s"
    measured = replace(found, policy=Policy.uniform(mpq.graph, "W2A2"), chosen_by="uniform W2A2")
    assert str(measured).splitlines()[-1] == f"chosen by measuring: uniform W2A2; the optimum of the scores: {proof}"


def test_untrained_and_frozen_and_authors(mpq, train):
    start = mpq.train_indicators(train, steps=0)
    assert start.provenance["movement"]["weight"]["largest_change"] == 0
    frozen = mpq.train_indicators(train, steps=4, freeze_weights=True)
    assert frozen.provenance["freeze_weights"] is True
    authors = mpq.train_indicators(train, steps=4, preset="authors")
    assert authors.provenance["optimizer"] == "sgd"
    with pytest.raises(InvalidArgument, match="preset"):
        mpq.train_indicators(train, steps=4, preset="best")


def test_without_labels_the_float_model_teaches(mpq, data):
    images = [data.tensors[0][i : i + 16] for i in range(0, 96, 16)]
    mpq.quantize(bitops="W4A4", train=images, val=images, steps=5, indicator_options={"steps": 4})
    assert mpq.metrics["quantized"]["fidelity_db"] > 0
    assert mpq.indicators.provenance["distill"] == 1.0


def test_with_nothing_but_a_budget_it_warns_once_and_works(mpq):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mpq.quantize(bitops="W6A6")
    assert len([w for w in caught if "synthetic" in str(w.message)]) == 1
    error = (mpq(X) - mpq.float_model(X)).norm() / mpq.float_model(X).norm()
    assert error < 0.5


def test_stored_indicators_are_used_without_data(mpq, train, tmp_path):
    mpq.quantize(bitops="W4A4", train=train, steps=2, indicator_options={"steps": 2})
    mpq.save_pretrained(tmp_path / "a")
    stored = HubMPQ.from_pretrained(tmp_path / "a", module=copy.deepcopy(mpq.float_model)).indicators
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HubMPQ.from_module(mpq.float_model, X[:1]).quantize(bitops="W3A3", indicators=stored, train=train, epochs=0)


@pytest.mark.parametrize("level", ["W1A1", "W2A8", "W5A3", "W8A8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_width_reloads_bit_equal(mpq, net, train, level, per_channel, tmp_path):
    mpq.apply_policy(level, train, per_channel=per_channel)
    if per_channel:
        mpq.finetune(train, steps=2)
    mpq.save_pretrained(tmp_path)
    assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=net)(X), mpq(X))


def test_pins_and_fixed_layers(net, train):
    mpq = HubMPQ.from_module(net, X[:1], fixed={"13": None, "3": "W8A8"}, exclude=["9"])
    mpq.train_indicators(train, steps=1)
    policy = mpq.search(bitops="W3A3").policy
    assert str(policy.bits["3"]) == "W8A8"
    assert "9" not in policy.bits
    assert mpq.graph["13"].fixed is None
    assert any(op.name == "9" for op in mpq.graph.floats)
    with pytest.raises(InvalidArgument, match="matches none"):
        mpq.search(bitops="W3A3", fixed={"layer*": "W4A4"})


def test_size_budget_is_met_by_the_file_itself(mpq, train, tmp_path):
    mpq.train_indicators(train, steps=1)
    floor, top = mpq.usage("W2A2")["size"], mpq.usage("W6A6")["size"]
    for cap in (floor, (floor + top) // 2, top - 1):
        mpq.apply_policy(mpq.search(size=cap).policy, train)
        assert mpq.save_pretrained(tmp_path) <= cap
    with pytest.raises(InfeasibleBudget, match="size"):
        mpq.search(size=floor - 1)


def test_nothing_is_trained_for_a_nonsense_budget(mpq, train):
    with pytest.raises(InvalidArgument):
        mpq.quantize(bitops="34", train=train)
    with pytest.raises(InvalidArgument):
        mpq.quantize(train=train)
    with pytest.raises(InfeasibleBudget):
        mpq.quantize(bitops=1000, train=train)
    assert mpq.indicators is None


def test_steps_out_of_order_say_what_to_do(mpq, train, tmp_path):
    for call in (mpq.usage, lambda: mpq.search(bitops="W4A4"), lambda: mpq.finetune(train)):
        with pytest.raises(HubMPQError, match=r"no policy|no indicators"):
            call()
    with pytest.raises(HubMPQError, match="no policy"):
        mpq.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_packed_model_has_no_float_weights_but_can_be_tuned_on(mpq, net, train, tmp_path):
    mpq.apply_policy("W4A4", train)
    mpq.save_pretrained(tmp_path)
    again = HubMPQ.from_pretrained(tmp_path, module=net)
    with pytest.raises(HubMPQError, match="no float weights"):
        again.quantize(bitops="W4A4", train=train)
    again.finetune(train, steps=2)
    again.save_pretrained(tmp_path / "tuned")
    assert read_manifest(tmp_path / "tuned" / PACKED).policy == mpq.policy


def test_packed_folders_that_do_not_fit_are_refused(mpq, net, train, tmp_path):
    mpq.apply_policy("W4A4", train)
    mpq.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="module="):
        HubMPQ.from_pretrained(tmp_path)
    with pytest.raises(PolicyMismatch):
        HubMPQ.from_pretrained(tmp_path, module=nn.Sequential(nn.Linear(3, 3)))
    other = copy.deepcopy(net)
    other[1] = nn.Identity()
    with pytest.raises(PackedFormat, match="unknown"):
        HubMPQ.from_pretrained(tmp_path, module=other)
    raw = bytearray((tmp_path / PACKED).read_bytes())
    raw[-5] ^= 1
    (tmp_path / PACKED).write_bytes(raw)
    with pytest.raises(PackedFormat):
        HubMPQ.from_pretrained(tmp_path, module=net)


def test_a_policy_of_another_model_is_refused(mpq, train):
    with pytest.raises(PolicyMismatch):
        mpq.apply_policy(Policy({"other": "W4A4"}, "0"), train)
    with pytest.raises(InvalidArgument):
        mpq.apply_policy("W44", train)


def test_saving_over_a_folder_keeps_it_whole_when_the_disk_refuses(mpq, net, train, tmp_path, monkeypatch):
    import hub_mpq.hub.folder as folder

    mpq.apply_policy("W4A4", train)
    mpq.save_pretrained(tmp_path / "out")
    kept = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_packed", full)
    with pytest.raises(HubMPQError, match="the disk is full"):
        mpq.save_pretrained(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == kept
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_timm_model_by_name_from_its_config_alone(tmp_path):
    mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, in_chans=1, num_classes=5)
    x = torch.randn(2, 1, 160, 160, generator=torch.Generator().manual_seed(0))
    mpq.apply_policy("W4A8", [x])
    mpq.save_pretrained(tmp_path)
    assert torch.equal(HubMPQ.from_pretrained(tmp_path)(x), mpq(x))


def test_budget_is_public():
    assert Budget(bitops="W4A4").given == {"bitops": "W4A4"}


def test_a_resumed_run_never_takes_another_policys_state(mpq, train, tmp_path):
    options = {
        "train": train,
        "steps": 3,
        "checkpoint_dir": tmp_path,
        "resume": True,
        "indicator_options": {"steps": 1},
    }
    mpq.quantize(weight_bits=6, **options)
    wide = mpq.model.get_submodule("3").weight_quantizer.scale.mean()
    mpq.quantize(weight_bits=2, **options)
    assert mpq.model.get_submodule("3").weight_quantizer.scale.mean() > 3 * wide
    assert len(list(tmp_path.glob("finetune-*"))) <= 2


def test_the_file_is_the_same_whether_the_process_that_quantizes_trained_the_indicators(net, data, tmp_path):
    from torch.utils.data import DataLoader

    from hub_mpq.data.order import Shuffled

    def loader():
        return DataLoader(data, batch_size=8, sampler=Shuffled(len(data), seed=1))

    one, train = HubMPQ.from_module(copy.deepcopy(net), X[:1]), loader()
    one.train_indicators(train, epochs=2)
    later = HubMPQ.from_module(copy.deepcopy(net), X[:1])
    later.scores = one.indicators
    one.quantize(train=train, bitops="W3A3", epochs=1)
    later.quantize(train=loader(), bitops="W3A3", epochs=1)
    for mpq, name in ((one, "one"), (later, "later")):
        mpq.save_pretrained(tmp_path / name)
    assert (tmp_path / "one" / PACKED).read_bytes() == (tmp_path / "later" / PACKED).read_bytes()


def test_calibration_on_a_shuffled_loader_is_the_same_again(net, data):
    from torch.utils.data import DataLoader

    scales = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        mpq = HubMPQ.from_module(copy.deepcopy(net), X[:1])
        mpq.apply_policy("W4A4", DataLoader(data, batch_size=4, shuffle=True), batches=1)
        scales.append(torch.cat([v.flatten().float() for v in mpq.model.state_dict().values()]))
    assert torch.equal(*scales)


def test_checkpoints_of_an_earlier_run_are_replaced(mpq, train, tmp_path):
    mpq.apply_policy("W4A4", train)
    for _ in range(2):
        mpq.finetune(train, steps=4, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_figures_of_before_a_training_are_not_kept(mpq, train, val):
    mpq.apply_policy("W4A4", train)
    mpq.evaluate(val)
    mpq.finetune(train, steps=1)
    assert "quantized" not in mpq.metrics


def test_indicators_of_another_model_do_not_stay_in_a_folder(mpq, net, train, tmp_path):
    mpq.quantize(bitops="W4A4", train=train, steps=1, indicator_options={"steps": 1})
    mpq.save_pretrained(tmp_path)
    HubMPQ.from_module(net, X[:1]).apply_policy("W4A4", train).save_pretrained(tmp_path)
    assert HubMPQ.from_pretrained(tmp_path, module=net).indicators is None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.body(self.table(ids)))


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_tied_head_reloads_bit_equal(per_channel, tmp_path):
    ids = torch.tensor([[1, 2, 3]])
    net = Tied().eval()
    mpq = HubMPQ.from_module(net, ids, fixed={"body": "W4A8"})
    mpq.apply_policy("W4A8", [ids], per_channel=per_channel).save_pretrained(tmp_path)
    assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=net)(ids), mpq(ids))


def test_pins_that_no_layer_can_keep_are_refused():
    ids = torch.tensor([[1, 2, 3]])
    mpq = HubMPQ.from_module(Tied().eval(), ids, fixed={"*": "W4A8"})
    assert str(mpq.graph["table"].fixed) == "W4A32", "an embedding reads indices"
    with pytest.raises(InvalidArgument, match="pin both to the same weight bits"):
        HubMPQ.from_module(Tied().eval(), ids, fixed={"head": None})
    with pytest.raises(InvalidArgument, match="exclude"):
        HubMPQ.from_module(Tied().eval(), ids, fixed={"body": "A8"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_the_grids_and_is_what_is_saved(dtype, mpq, net, train, tmp_path):
    mpq.apply_policy("W8A8", train)
    before, scale = mpq(X), mpq.model[3].weight_quantizer.scale.detach().clone()
    mpq.model.to(dtype)
    assert torch.equal(mpq.model[3].weight_quantizer.scale, scale)
    got = mpq(X.to(dtype))
    assert got.dtype == dtype
    assert (got.double() - before).norm() / before.norm() < 0.05
    assert mpq.save_pretrained(tmp_path) == mpq.usage()["size"]
    again = HubMPQ.from_pretrained(tmp_path, module=net)
    assert torch.equal(again(X.to(dtype)), got)
    assert net[3].weight.dtype == torch.float32, "the module that was given is copied"


def test_a_network_without_bias_is_loaded_in_the_commonest_dtype_of_its_file(tmp_path):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 3, bias=False)).eval()
    mpq = HubMPQ.from_module(net, x).apply_policy("W4A8", [x])
    mpq.model.bfloat16()
    mpq.save_pretrained(tmp_path)
    again = HubMPQ.from_pretrained(tmp_path, module=net)
    assert torch.equal(again(x.bfloat16()), mpq(x.bfloat16()))


@pytest.mark.parametrize(("layer", "part"), [("3", "weight"), ("13", "bias")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_no_grid_holds_are_refused_by_their_layer(value, layer, part, net, train, tmp_path):
    mpq = HubMPQ.from_module(net, X[:1]).apply_policy("W4A4", train)
    for model in (mpq.model, net):
        getattr(model.get_submodule(layer), part).data.view(-1)[1] = value
    refused = pytest.raises(InvalidArgument, match=f"cannot quantize layer '{layer}': its {part} contains NaN")
    with refused:
        mpq.save_pretrained(tmp_path)
    with refused:
        mpq.apply_policy("W4A4", train)
    for strategy in ("limpq", "mse", "dq"):
        with refused:
            mpq.train_scores(train, strategy=strategy, steps=1)
    with refused:
        mpq.quantize(train=train, val=train, bitops="W4A4")


def test_a_loss_that_is_no_number_does_not_keep_a_model_from_being_saved(mpq, net, train, tmp_path):
    mpq.apply_policy("W4A4", train)
    mpq.metrics["quantized"] = {"top1": 20.0, "loss": float("nan")}
    mpq.save_pretrained(tmp_path)
    assert HubMPQ.from_pretrained(tmp_path, module=net).metrics == {"quantized": {"top1": 20.0}}


class Branch(nn.Module):
    """A branch that starts at zero, as LoRA's, ControlNet's and zero-initialised residual blocks do."""

    def __init__(self, zero):
        super().__init__()
        self.stem, self.zero, self.head = nn.Linear(8, 16), zero, nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(x + self.zero(x))


@pytest.mark.parametrize(
    ("zero", "level"), [("linear", "W4A8"), ("linear", "W1A4"), ("lora", "W4A4"), ("lora", "W2A8"), ("two", "W4A4")]
)
@pytest.mark.parametrize("lr", [1e-5, 1e-2])
def test_a_layer_of_zeros_leaves_zero(zero, level, lr, tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 8, generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = nn.Linear(16, 16)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        before = {"lora": [nn.Linear(16, 16)], "two": [], "linear": []}[zero]
        net = Branch(nn.Sequential(*before, last, *([nn.Linear(16, 16)] if zero == "two" else []))).eval()
    name = f"zero.{len(before)}"
    mpq = HubMPQ.from_module(net, x[:1]).apply_policy(level, [x])
    layer = mpq.model.get_submodule(name)
    assert layer.weight_quantizer(layer.weight).abs().max() < 1e-25
    mpq.finetune([(x, torch.arange(32) % 3)], steps=5, lr=lr)
    on_grid = layer.weight_quantizer(layer.weight)
    assert layer.weight.abs().max() > lr
    assert (on_grid - layer.weight).norm() < layer.weight.norm()
    assert on_grid.abs().max().item() == pytest.approx(layer.weight.abs().max().item(), rel=0.2)
    mpq.save_pretrained(tmp_path)
    assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=net)(x), mpq(x))


class OwnLinear(nn.Linear):
    """A type that has no quantized form."""


def test_a_network_without_a_layer_to_quantize_is_refused():
    net = nn.Sequential(OwnLinear(4, 4), nn.ReLU(), OwnLinear(4, 2))
    x = torch.randn(3, 4)
    mpq = HubMPQ.from_module(net, x)
    assert [op.name for op in mpq.graph.floats] == ["0", "2"]
    words = "no layer of 'Sequential' can be quantized; 2: OwnLinear is an unknown subclass of nn.Linear"
    for step in (
        lambda: mpq.apply_policy("W4A4", [x]),
        lambda: mpq.quantize(bitops="W4A4", train=[(x, torch.zeros(3, dtype=torch.long))]),
        lambda: mpq.search(bitops="W4A4"),
        lambda: mpq.train_indicators([x]),
        lambda: mpq.check_reachable(bitops="W4A4"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            step()
    assert mpq.policy is None


def test_a_network_that_is_quantized_already_is_refused(mpq, net, train):
    mpq.apply_policy("W4A4", train)
    with pytest.raises(InvalidArgument, match="already quantized"):
        HubMPQ.from_module(mpq.model, X[:1])
    inside = nn.Sequential(nn.Identity(), mpq.model)
    with pytest.raises(InvalidArgument, match=r"already quantized \(layer '1\."):
        HubMPQ.from_module(inside, X[:1])
    assert mpq.apply_policy("W2A2", train).policy  # from its own float model


def test_a_network_that_is_one_layer_is_refused():
    x = torch.randn(3, 4)
    mpq = HubMPQ.from_module(nn.Linear(4, 2), x)
    with pytest.raises(InvalidArgument, match=r"nn.Sequential\(net\)"):
        mpq.apply_policy("W4A4", [x])


def test_what_search_returned_is_a_policy(mpq, train):
    mpq.train_indicators(train, steps=0)
    found = mpq.search(bitops="W4A4")
    assert mpq.apply_policy(found, train).policy == found.policy


@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_computes(normed, tmp_path):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), normed(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3)).eval()
    net(x)
    mpq = HubMPQ.from_module(net, x[:1], fixed={"*": None}).apply_policy("W4A8", [x])
    mpq.save_pretrained(tmp_path)
    assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=net)(x), mpq(x))


def test_a_generator_calibrates_on_as_many_batches_as_a_list():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [torch.full((2, 4), float(i)) for i in range(20)]  # the later, the larger
    scales = []
    for data in (batches, iter(batches), batches[:16]):
        mpq = HubMPQ.from_module(net, batches[0], fixed={"0": "W4A4"}).apply_policy("W4A4", data, batches=20)
        scales.append(float(mpq.model[0].input_quantizer.scale))
    assert scales[0] == scales[1] != scales[2]


def test_the_folder_of_checkpoints_is_made_before_the_work(net, train, tmp_path):
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8))
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="cannot create the folder checkpoint_dir="):
        mpq.quantize(
            bitops="W4A4", train=train, strategy="gradient", epochs=0, checkpoint_dir=tmp_path / "file" / "states"
        )
    assert mpq.scores is None
    mpq.quantize(bitops="W4A4", train=train, strategy="gradient", epochs=0, checkpoint_dir=tmp_path / "new" / "states")
    assert [path.name[:7] for path in (tmp_path / "new" / "states").iterdir()] == ["scores-"]


def test_the_folder_is_made_before_weights_are_rounded(net, train, tmp_path, monkeypatch):
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8), weight_only=True)
    (tmp_path / "file").write_text("")
    rounded = []
    whole = HubMPQ._rounded
    monkeypatch.setattr(HubMPQ, "_rounded", lambda *args: rounded.append(args) or whole(*args))
    with pytest.raises(InvalidArgument, match="cannot create the folder checkpoint_dir="):
        mpq.quantize(size="W4", train=train, epochs=0, checkpoint_dir=tmp_path / "file" / "states")
    assert not rounded
    mpq.quantize(size="W4", train=train, epochs=0, checkpoint_dir=tmp_path / "new" / "states")
    assert rounded
