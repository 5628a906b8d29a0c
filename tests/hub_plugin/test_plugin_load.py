"""AutoModel.from_pretrained of packed folders: the same arithmetic as HubMPQ's own load, and back to the same bytes."""

from __future__ import annotations

import copy
import io
import json
import pickle
from dataclasses import replace

import pytest
import torch
import transformers
from plugin_toys import build, pack
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.core.files import CONFIG, PACKED
from hub_mpq.errors import HubMPQError, PackedFormat, PolicyMismatch
from hub_mpq.nn.packed import packed_layers
from hub_mpq.pack import read_packed, write_packed


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_logits_and_saved_bytes_are_those_of_hub_mpq(packed, tmp_path):
    own = HubMPQ.from_pretrained(packed.folder)
    model = packed.cls.from_pretrained(packed.folder)
    assert torch.equal(packed.logits(own), packed.logits())
    assert torch.equal(packed.logits(model), packed.logits(own))
    assert len(list(packed_layers(model))) == len(packed.mpq.graph)
    assert not any("transformers_weights" in c for c in (model.config.to_dict(), (packed.folder / CONFIG).read_text()))
    model.save_pretrained(tmp_path / "again")
    packed.mpq.model.save_pretrained(tmp_path / "memory")
    want = files(packed.folder)
    for name in ("again", "memory"):
        have = files(tmp_path / name)
        assert set(have) <= {CONFIG, PACKED, "generation_config.json"}, "never a packed model.safetensors"
        assert have[PACKED] == want[PACKED]
        assert have[CONFIG] == want[CONFIG]
    assert b"_name_or_path" not in want[CONFIG]
    twice = copy.deepcopy(model)
    twice.save_pretrained(tmp_path / "twice")
    assert files(tmp_path / "twice")[PACKED] == want[PACKED]


def test_packed_weights_stay_small_in_memory(bert):
    model = bert.cls.from_pretrained(bert.folder)
    words = sum(
        b.numel() * b.element_size() for _, m in packed_layers(model) for k, b in m.named_buffers(recurse=False)
    )
    floats = sum(4 * layer.weight_count for layer in bert.mpq.graph if layer.weight_owner is None)
    assert words < floats / 2
    assert not any(isinstance(m._parameters.get("weight"), nn.Parameter) for _, m in packed_layers(model))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_bfloat16_and_device_map(kind, tmp_path):
    case = pack(tmp_path, kind)
    case.inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.inputs.items()}
    model = case.cls.from_pretrained(case.folder, dtype=torch.bfloat16, device_map="cpu")
    layer = next(m for _, m in packed_layers(model))
    assert layer.weight_scale.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    own = HubMPQ.from_pretrained(case.folder, dtype=torch.bfloat16)
    assert case.logits(model).dtype == torch.bfloat16
    assert torch.equal(case.logits(model), case.logits(own))
    later = case.cls.from_pretrained(case.folder).to(torch.bfloat16)
    assert torch.equal(case.logits(later), case.logits(model)), "a cast after loading must leave the scales alone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_is_saved_as_it_is(dtype, tmp_path):
    case = pack(tmp_path, "classifier")
    case.mpq.to(dtype)  # layers with quantizers, inside of a parent
    scales = {p.dtype for n, p in case.mpq.named_parameters() if "quantizer" in n}
    assert scales == {torch.float32}
    packed = case.cls.from_pretrained(case.folder).to(dtype)
    for name, model in (("hub", case.mpq), ("net", case.mpq.model), ("packed", packed)):
        model.save_pretrained(tmp_path / name)
        assert case.logits(model).dtype == dtype
        for again in (HubMPQ.from_pretrained(tmp_path / name), case.cls.from_pretrained(tmp_path / name)):
            assert case.logits(again).dtype == dtype
            assert torch.equal(case.logits(again), case.logits(model))
    assert case.logits(HubMPQ.from_pretrained(tmp_path / "hub", dtype=torch.float32)).dtype == torch.float32


def stored(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, stored, lambda m: pickled(copy.deepcopy(m))])
def test_a_copy_saves_and_pushes_itself(copied, bert, tmp_path):
    for kind, model in (("quantized", bert.mpq.model), ("packed", bert.cls.from_pretrained(bert.folder))):
        twin = copied(model)
        assert torch.equal(bert.logits(twin), bert.logits(model))
        assert twin.save_pretrained.__self__ is twin.push_to_hub.__self__ is twin
        with torch.no_grad():
            twin.cls.predictions.bias += 1
        twin.save_pretrained(tmp_path / kind)
        assert {p.name for p in (tmp_path / kind).iterdir()} == {CONFIG, PACKED}
        assert torch.equal(bert.logits(bert.cls.from_pretrained(tmp_path / kind)), bert.logits(twin))
        assert not torch.equal(bert.logits(twin), bert.logits(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, stored])
def test_a_copy_of_hub_mpq_is_independent(copied, bert, tmp_path):
    before = bert.logits()
    twin = copied(bert.mpq)
    with torch.no_grad():
        twin.model.cls.predictions.bias += 1
    twin.save_pretrained(tmp_path)
    assert torch.equal(bert.logits(), before)
    assert torch.equal(bert.logits(HubMPQ.from_pretrained(tmp_path)), bert.logits(twin))
    assert torch.equal(bert.logits(twin.apply_policy(twin.policy)), before)


def test_generate(gpt2):
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2.folder)
    arguments = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    ids = gpt2.inputs["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    assert out.shape == (1, 20)
    assert torch.equal(out, gpt2.mpq.model.generate(ids, attention_mask=torch.ones_like(ids), **arguments))


def test_pipeline(tmp_path):
    case = pack(tmp_path, "vit")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(case.folder)
    image = (torch.rand(40, 30, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    from PIL import Image

    pipe = transformers.pipeline("image-classification", model=str(case.folder), device="cpu")
    assert len(list(packed_layers(pipe.model)))
    found = pipe(Image.fromarray(image), top_k=2)
    case.inputs = dict(processor(Image.fromarray(image), return_tensors="pt"))
    want = case.logits().softmax(-1)[0].sort(descending=True).values
    assert [round(row["score"], 6) for row in found] == [round(float(v), 6) for v in want[:2]]


def test_without_its_head_or_with_a_new_one(bert, tmp_path):
    body = transformers.AutoModel.from_pretrained(bert.folder)
    own = bert.mpq.model.bert
    ids = bert.inputs["input_ids"]
    assert torch.equal(body(ids)[0], own(ids)[0])
    body.save_pretrained(tmp_path / "body")
    again = HubMPQ.from_pretrained(tmp_path / "body")
    assert torch.equal(again(ids)[0], body(ids)[0])
    task = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3)
    assert torch.equal(task.bert(ids)[0], body(ids)[0])
    task.save_pretrained(tmp_path / "task")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "task")
    assert torch.equal(back.eval()(ids)[0], task.eval()(ids)[0])


def test_dequantize_gives_the_float_model(bert):
    model = bert.cls.from_pretrained(bert.folder)
    weight = model.bert.encoder.layer[0].output.dense.weight
    model = model.dequantize()
    assert not any(packed_layers(model))
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, weight)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert "quantization_config" not in model.config.to_dict()
    assert torch.allclose(bert.logits(model), bert.logits(), atol=0.2)  # six-bit inputs are float now


def test_folders_that_are_wrong_are_refused(bert, tmp_path):
    def changed(name, edit=None, raw=None):
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((bert.folder / CONFIG).read_text())
        if edit:
            edit(config)
        (folder / CONFIG).write_text(json.dumps(config))
        data = bytearray((bert.folder / PACKED).read_bytes())
        if raw:
            raw(data)
        (folder / PACKED).write_bytes(data)
        return folder

    def flip(data):
        data[-9] ^= 4

    with pytest.raises(PackedFormat, match="digest"):
        bert.cls.from_pretrained(changed("flip", raw=flip))
    version = changed("version", lambda c: c["quantization_config"].update(format_version=9))
    with pytest.raises(PackedFormat, match="format_version"):
        bert.cls.from_pretrained(version)
    name = "bert.encoder.layer.0.output.dense"
    other = changed("policy", lambda c: c["quantization_config"]["policy"]["bits"].update({name: "W7A7"}))
    with pytest.raises(PackedFormat, match="policy"):
        bert.cls.from_pretrained(other)
    with pytest.raises((PackedFormat, PolicyMismatch)):
        bert.cls.from_pretrained(changed("deep", lambda c: c.update(num_hidden_layers=3)))
    with pytest.raises((PackedFormat, PolicyMismatch)):
        bert.cls.from_pretrained(changed("wide", lambda c: c.update(intermediate_size=96)))
    body = changed("shallow", lambda c: c.update(num_hidden_layers=1))
    with pytest.raises((PackedFormat, PolicyMismatch)):
        bert.cls.from_pretrained(body)
    with pytest.raises((PackedFormat, PolicyMismatch)):
        transformers.AutoModelForSequenceClassification.from_pretrained(
            changed("classes", lambda c: c.update(num_hidden_layers=3, architectures=["Other"]))
        )
    unknown = changed("library")
    tensors, manifest = read_packed(unknown / PACKED)
    write_packed(unknown / PACKED, tensors, replace(manifest, library="nobody's"))
    with pytest.raises(PackedFormat, match="nobody's"):
        bert.cls.from_pretrained(unknown)
    (bert_only := changed("gone") / PACKED).unlink()
    with pytest.raises(OSError, match=PACKED):
        bert.cls.from_pretrained(bert_only.parent)


def test_saving_beside_float_weights_is_refused(bert, tmp_path):
    model = bert.cls.from_pretrained(bert.folder)
    build("bert")[0].save_pretrained(tmp_path)
    with pytest.raises(HubMPQError, match=r"model\.safetensors"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / PACKED).exists()
    with pytest.raises(ValueError, match="not serializable"):
        type(model).save_pretrained(model, tmp_path / "plain")  # transformers' own never writes packed tensors
