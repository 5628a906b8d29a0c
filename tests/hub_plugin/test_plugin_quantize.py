"""from_pretrained(float, quantization_config=MPQConfig(…)), and training with the ordinary Trainer."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from plugin_toys import IDS, build, pack
from torch.utils.data import Dataset

from hub_mpq import HubMPQ, LayerBits, MPQConfig, Policy
from hub_mpq.core.files import PACKED
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.pack import read_manifest, write_indicators


def test_a_level_gives_what_hub_mpq_gives(bert, tmp_path):
    with pytest.warns(UserWarning, match="no calibration"):
        model = bert.cls.from_pretrained(bert.float_folder, quantization_config=MPQConfig("W3A6"))
    assert torch.equal(bert.logits(model), bert.logits())
    model.save_pretrained(tmp_path)
    assert read_manifest(tmp_path / PACKED).policy == bert.mpq.policy
    assert torch.equal(bert.logits(bert.cls.from_pretrained(tmp_path)), bert.logits(model))
    assert torch.equal(bert.logits(HubMPQ.from_pretrained(tmp_path)), bert.logits(model))


def test_a_policy_with_calibration_batches(bert):
    batches = [{"input_ids": (torch.arange(16).view(2, 8) * k) % 50} for k in (1, 3, 5)]
    want = HubMPQ.from_pretrained(bert.float_folder).apply_policy("W4A4", batches)
    config = MPQConfig(want.policy, calibration=batches)
    model = bert.cls.from_pretrained(bert.float_folder, quantization_config=config)
    assert torch.equal(bert.logits(model), bert.logits(want))
    by_dict = MPQConfig(want.policy.to_dict(), calibration=batches)
    assert by_dict.policy == want.policy


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rounding", [None, "nearest"])
def test_groups_zero_points_and_rounding_as_hub_mpq_has_them(kind, rounding, tmp_path):
    model, inputs = build(kind)
    model.save_pretrained(tmp_path / "float")
    batches = [{"input_ids": (torch.arange(24).view(2, 12) * k) % 50} for k in (1, 3, 5)]
    form = {"group_size": 16, "symmetric": False, "rounding": rounding}
    want = HubMPQ.from_pretrained(tmp_path / "float", weight_only=True)
    want.apply_policy("W3", batches, **form)
    config = MPQConfig(want.policy, calibration=batches, rounding=rounding)
    found = type(model).from_pretrained(tmp_path / "float", quantization_config=config, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(found(**inputs).logits, want(**inputs).logits)
        found.save_pretrained(tmp_path / "packed")
        version = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["format_version"]
        assert version == 2
        back = type(model).from_pretrained(tmp_path / "packed")
        assert torch.equal(back(**inputs).logits, want(**inputs).logits)
        again = HubMPQ.from_pretrained(tmp_path / "packed")
        assert again.policy == want.policy
        assert torch.equal(again(**inputs).logits, want(**inputs).logits)
        out = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(back.generate(inputs["input_ids"], **out), want.model.generate(inputs["input_ids"], **out))
        half = type(model).from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
        layers = [m for m in half.modules() if getattr(m, "kind", "") in ("linear", "conv1d") and not m.owner]
        assert {m.weight_scale.dtype for m in layers} <= {torch.float16, torch.float32}
        half.save_pretrained(tmp_path / "half")
    for name in want.graph.names:
        a, b = (HubMPQ.from_pretrained(tmp_path / x).model.get_submodule(name) for x in ("packed", "half"))
        assert torch.equal(a.weight_quantizer.scale, b.weight_quantizer.scale), name


@pytest.mark.filterwarnings("ignore:no calibration")
def test_a_budget_in_groups(tmp_path):
    model, _ = build("llama")
    model.save_pretrained(tmp_path / "float")
    with pytest.warns(UserWarning, match="no stored indicators"):
        found = type(model).from_pretrained(
            tmp_path / "float", quantization_config=MPQConfig(size="W4A8", group_size=16), dtype=torch.float32
        )
    policy = found.hf_quantizer.manifest.policy
    mpq = HubMPQ.from_pretrained(tmp_path / "float")
    assert {policy.bits[x.name].group_size for x in mpq.graph.searched} == {16}
    found.save_pretrained(tmp_path / "packed")
    size = (tmp_path / "packed" / PACKED).stat().st_size
    assert size == mpq.usage(policy)["size"] <= mpq.usage("W4g16A8")["size"]
    assert str(tmp_path).encode() not in (tmp_path / "packed" / PACKED).read_bytes()
    for more in ({"group_size": 7}, {"rounding": "awq"}):
        with pytest.raises(InvalidArgument):
            MPQConfig("W4", **more)


@pytest.mark.filterwarnings("ignore:no calibration")
def test_a_budget_is_met_by_stored_scores_of_several_group_sizes(tmp_path):
    model, _ = build("llama")
    model.save_pretrained(tmp_path / "float")
    batches = [{"input_ids": (torch.arange(24).view(2, 12) * k) % 50} for k in (1, 3, 5)]
    mpq = HubMPQ.from_pretrained(tmp_path / "float", weight_only=True)
    mpq.quantize(size="W4", group_size=[None, 16], train=batches, epochs=0, validate=False)
    write_indicators(tmp_path / "float" / "indicators.safetensors", mpq.scores)

    def load(**more):
        return type(model).from_pretrained(tmp_path / "float", quantization_config=MPQConfig(**more))

    # its inputs of fixed layers are quantized, those of `mpq` are not
    whole = HubMPQ.from_pretrained(tmp_path / "float")
    limit = int(whole.usage("W3g16A32")["size"])
    for size, more in ((limit, {}), (limit - 200, {}), (limit, {"group_size": 16})):
        found = load(size=size, **more)
        policy = found.hf_quantizer.manifest.policy
        sizes = {policy.bits[x.name].group_size for x in mpq.graph.searched}
        assert sizes == ({16} if more else {None, 16})
        found.save_pretrained(tmp_path / "packed")
        assert size - 200 < (tmp_path / "packed" / PACKED).stat().st_size <= size
    with pytest.raises(InvalidArgument, match="no score at these candidates"):
        load(size=limit, group_size=32)


@pytest.mark.filterwarnings("ignore:no calibration")
def test_a_budget_is_met_from_a_sharded_float_checkpoint(tmp_path):
    model, _ = build("bert")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    with pytest.warns(UserWarning, match="no stored indicators"):
        found = type(model).from_pretrained(
            tmp_path / "shards", quantization_config=MPQConfig(bitops="W4A4", size="W5"), dtype=torch.float32
        )
    mpq = HubMPQ.from_pretrained(tmp_path / "shards")
    policy = found.hf_quantizer.manifest.policy
    assert mpq.usage(policy)["bitops"] <= mpq.usage("W4A4")["bitops"]
    assert mpq.usage(policy)["size"] <= mpq.usage("W5A8")["size"]
    found.save_pretrained(tmp_path / "packed")
    assert (tmp_path / "packed" / PACKED).stat().st_size <= mpq.usage("W5A8")["size"]


def test_timm_through_its_wrapper(tmp_path):
    import timm

    net = timm.create_model("test_resnet").eval()
    timm.models.save_for_hf(net, tmp_path / "float", safe_serialization=True)
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    config.get("model_args", {}).pop("num_classes", None)  # transformers' wrapper would pass it twice
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    auto = transformers.AutoModelForImageClassification
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    config = MPQConfig("W4A8", calibration=[x])
    model = auto.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    logits = model(x).logits
    assert torch.equal(HubMPQ.from_pretrained(tmp_path / "packed")(x), logits)
    again = auto.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(x).logits, logits)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / PACKED).read_bytes() == (tmp_path / "packed" / PACKED).read_bytes()
    body = transformers.AutoModel.from_pretrained(tmp_path / "packed")
    assert body(x).last_hidden_state.shape[1] == 96


def test_nonsense_is_refused(bert):
    for wrong in ({}, {"policy": "W3", "bitops": "W4A4"}, {"bitopps": "W4A4"}, {"policy": {"bits": 3}}):
        with pytest.raises(InvalidArgument):
            MPQConfig(**wrong)
    other = Policy({"x": LayerBits(4, 4)}, "0" * 64)
    with pytest.raises(HubMPQError, match="another model"):
        bert.cls.from_pretrained(bert.float_folder, quantization_config=MPQConfig(other))


class Rows(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, k):
        ids = (torch.arange(12) * (k % 7 + 1)) % 50
        return {"input_ids": ids, "labels": torch.tensor(k % 7 % 3)}


def trainer(model, folder):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=20,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Rows())


def test_qat_with_the_ordinary_trainer(tmp_path):
    case = pack(tmp_path / "case", "classifier", "W3A4")
    model = case.mpq.model
    assert model.hf_quantizer.is_trainable

    def loss():
        batch = torch.utils.data.default_collate([Rows()[k] for k in range(32)])
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss()
    scale = model.bert.encoder.layer[0].output.dense.weight_quantizer.shift.detach().clone()
    run = trainer(model, tmp_path / "run")
    run.train()
    assert loss() < before - 0.1
    assert not torch.equal(model.bert.encoder.layer[0].output.dense.weight_quantizer.shift, scale), "scales train too"
    run.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="valid checkpoint"):  # packed weights are no state to go on from
        run.train(resume_from_checkpoint=str(tmp_path / "saved"))
    case.inputs = IDS
    back = case.cls.from_pretrained(tmp_path / "saved")
    assert torch.equal(case.logits(back), case.logits(model.eval()))
    assert torch.equal(case.logits(HubMPQ.from_pretrained(tmp_path / "saved")), case.logits(back))
    with pytest.raises(ValueError, match="fine-tuning"):
        trainer(back, tmp_path / "no")  # packed weights do not train


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_float_head_that_is_tied_is_stored_once(kind, tmp_path):
    from safetensors.torch import load_file

    model, inputs = build(kind)
    model.save_pretrained(tmp_path / "float")
    words = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}[kind]
    mpq = HubMPQ.from_pretrained(tmp_path / "float", weight_only=True, exclude=[words, "lm_head"])
    mpq.apply_policy("W4")
    assert mpq.save_pretrained(tmp_path / "packed") == mpq.usage()["size"]
    stored = load_file(tmp_path / "packed" / PACKED)
    assert f"{words}.weight" in stored
    assert "lm_head.weight" not in stored
    back = HubMPQ.from_pretrained(tmp_path / "packed")
    auto = type(model).from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        wanted = mpq(**inputs).logits
        assert torch.equal(back(**inputs).logits, wanted)
        assert torch.equal(auto(**inputs).logits, wanted)
    assert auto.lm_head.weight is auto.get_input_embeddings().weight
    back.save_pretrained(tmp_path / "again")
    auto.save_pretrained(tmp_path / "auto")
    for name in ("again", "auto"):
        assert (tmp_path / name / PACKED).read_bytes() == (tmp_path / "packed" / PACKED).read_bytes()
