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
from hub_mpq.pack import read_manifest


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
    assert mpq.usage(policy)["size"] <= mpq.usage("W5")["size"]
    found.save_pretrained(tmp_path / "packed")
    assert (tmp_path / "packed" / PACKED).stat().st_size <= mpq.usage("W5")["size"]


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
