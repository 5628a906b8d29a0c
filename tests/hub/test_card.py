"""Cards: what is known stands there, what is not is left out."""

import json
import re

import pytest
import torch
import yaml
from hub_toys import IDS, IMAGE, float_bert, timm_toy
from huggingface_hub import ModelCard
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hub_mpq import HubMPQ
from hub_mpq.core.files import PACKED

pytestmark = pytest.mark.hub
FIGURES = {
    "float": {"top1": 76.5, "top5": 93.0, "samples": 800.0},
    "uniform W4A4": {"top1": 61.25, "samples": 800.0},
    "quantized": {"top1": 75.125, "top5": 92.5, "samples": 800.0},
}


def card_of(hub, name):
    return ModelCard(hub.store.content(name)["README.md"].decode())


def test_nothing_is_invented(hub, mpq):
    mpq.push_to_hub("me/toy", token="write-token")
    card = card_of(hub, "me/toy")
    data = card.data.to_dict()
    assert data["library_name"] == "hub-mpq"
    assert not {"license", "base_model", "base_model_relation", "model-index", "datasets", "pipeline_tag"} & set(data)
    assert "Measured" not in card.text
    assert "None" not in card.text
    assert "top-1" not in card.text
    assert "module=net" in card.text
    assert "timm" not in card.text
    assert "AutoModel" not in card.text
    assert "policy.png" in card.text
    assert ".eval_results/hub-mpq.yaml" not in hub.store.content("me/toy")


def test_what_was_measured_stands_in_every_form(hub, tmp_path):
    mpq = timm_toy()
    mpq.metrics = FIGURES
    mpq.push_to_hub(
        "me/timm", token="write-token", dataset="org/images", eval_task="default", trained_on="org/training-images"
    )
    there = hub.store.content("me/timm")
    card = card_of(hub, "me/timm")
    assert card.data.base_model == "timm/test_resnet.r160_in1k"
    assert card.data.base_model_relation == "quantized"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.datasets == ["org/training-images"]
    results = {r.metric_name: (r.metric_value, r.dataset_type) for r in card.data.eval_results}
    assert results == {"top-1 (%)": (75.125, "org/images"), "top-5 (%)": (92.5, "org/images")}
    entry = yaml.safe_load(there[".eval_results/hub-mpq.yaml"])
    assert entry[0]["dataset"] == {"id": "org/images", "task_id": "default"}
    assert entry[0]["value"] == 75.125
    rows = {line.split("|")[1].strip(): line.split("|") for line in card.text.splitlines() if line.startswith("|")}
    assert rows["float"][4].strip() == "76.5"
    assert rows["uniform W4A4"][4].strip() == "61.25"
    uniform = HubMPQ.from_pretrained("test_resnet", pretrained=False, num_classes=5)
    bytes_there = uniform.apply_policy("W4A4", [IMAGE]).save_pretrained(tmp_path / "uniform")
    assert rows["uniform W4A4"][3].strip() == f"{bytes_there / 1e3:.3f} KB"
    assert rows["uniform W4A4"][5].strip() == "", "top-5 was not measured there"
    assert rows["mixed precision (this repo)"][3].strip() == f"{len(there[PACKED]) / 1e3:.3f} KB"
    assert "800 samples" in card.text
    assert "Its results were not measured" in card.text
    assert 'create_model("hf-hub:me/timm"' in card.text
    assert 'AutoModelForImageClassification.from_pretrained("me/timm")' in card.text
    mpq.metrics = {**FIGURES, "float copy": {"top1": 76.0, "samples": 800.0}}
    mpq.push_to_hub("me/timm", token="write-token", float_copy=False, base_model="timm/other", license="cc0-1.0")
    card = card_of(hub, "me/timm")
    assert (card.data.base_model, card.data.license) == ("timm/other", "cc0-1.0")
    assert "create_model" not in card.text
    assert "hub-mpq is required: timm alone finds no weights" in card.text
    assert set(there) - set(hub.store.content("me/timm")) == {"model.safetensors", ".eval_results/hub-mpq.yaml"}


def test_the_base_models_card_and_tokenizer_are_carried_over(hub, tmp_path):
    hub.store.make("base/bert", files=float_bert(tmp_path / "float"))
    mpq = HubMPQ.from_pretrained("base/bert")
    assert mpq.graph.revision == hub.store.repos["base/bert"].refs["main"]
    mpq.apply_policy("W4A8").push_to_hub("me/bert", token="write-token", float_copy=False)
    card = card_of(hub, "me/bert")
    assert card.data.base_model == "base/bert"
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "feature-extraction"
    assert f"base/bert at {mpq.graph.revision}" in card.text
    there = hub.store.content("me/bert")
    assert there["tokenizer.json"] == b"{}"
    assert "training_args.bin" not in there
    assert "BertModel.from_pretrained" in card.text
    fresh = HubMPQ.from_pretrained("me/bert")
    assert hub.count("GET", "me/bert/resolve")
    assert (fresh.policy, fresh.graph.model_id) == (mpq.policy, "base/bert")


def test_paths_of_the_authors_disk_and_markdown_of_others_stay_out(hub, tmp_path, net, x):
    float_bert(tmp_path / "my-bert")
    HubMPQ.from_pretrained(tmp_path / "my-bert").apply_policy("W8A8").push_to_hub("me/local", token="write-token")
    card = card_of(hub, "me/local")
    assert str(tmp_path) not in card.content
    assert "my-bert" in card.text
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "feature-extraction")
    assert hub.store.content("me/local")["tokenizer.json"] == b"{}"
    mpq = HubMPQ.from_module(net, x[:1], model_id="a `b` | <script>{{ 1 }}").apply_policy("W4A8", [x])
    mpq.push_to_hub("me/odd", token="write-token")
    assert "<script>" not in card_of(hub, "me/odd").text
    assert "{{ 1 }}" in card_of(hub, "me/odd").text, "names are text, never a template"


def test_how_it_was_made_is_what_was_recorded(hub, net, x, train):
    mpq = HubMPQ.from_module(net, x[:1], model_id="toy")
    mpq.quantize(
        bitops="W4A4", train=train, steps=3, indicator_options={"steps": 2}, finetune_options={"lr": 2e-4}, seed=5
    )
    mpq.push_to_hub("me/made", token="write-token")
    text = card_of(hub, "me/made").text
    search = mpq._manifest(mpq.policy).provenance["search"]
    assert f"| search: status | {search['status']} |" in text
    assert f"| search: gap | {search['gap']:.6g} |" in text
    assert f"| search: strategy | {search['strategy']} |" in text
    assert "| indicators: steps | 2 |" in text
    assert ".scores\n" in text
    assert "indicators=scores" in text
    assert "| finetune: steps | 3 |" in text
    assert "| finetune: lr | 0.0002 |" in text
    assert "| finetune: seed | 5 |" in text
    assert "| seconds: finetune |" in text
    assert "| seconds: indicators |" in text
    again = HubMPQ.from_pretrained("me/made", module=net)
    again.push_to_hub("me/again", token="write-token")
    text = card_of(hub, "me/again").text
    assert "| search: status |" in text, "what the file knows stays"
    assert "seconds: finetune" not in text


def test_without_matplotlib_the_picture_is_left_out(hub, mpq, monkeypatch):
    monkeypatch.setattr("hub_mpq.plot.find_spec", lambda name: None)
    mpq.push_to_hub("me/toy", token="write-token")
    assert "policy.png" not in hub.store.content("me/toy")
    assert "policy.png" not in card_of(hub, "me/toy").text
    config = json.loads(hub.store.content("me/toy")["config.json"])
    assert config["quantization_config"]["quant_method"] == "mpq"


def test_weights_of_ones_own_have_no_base_model(hub, tmp_path):
    """What was made from scratch or from a file is not the published model, nor under its licence."""
    from safetensors.torch import save_file

    mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, num_classes=5)
    file = tmp_path / "weights.safetensors"
    save_file(mpq.model.state_dict(), file)
    for name, start in (
        ("scratch", mpq),
        ("file", HubMPQ.from_pretrained("test_resnet", checkpoint_path=file, num_classes=5)),
    ):
        start.apply_policy("W4A8", [IMAGE]).save_pretrained(tmp_path / name)
        HubMPQ.from_pretrained(tmp_path / name).push_to_hub(f"me/{name}", token="write-token")
        card = card_of(hub, f"me/{name}")
        assert not {"base_model", "base_model_relation", "license"} & set(card.data.to_dict())
        assert "| float model | test_resnet, with its own weights |" in card.text
        assert "For another budget" not in card.text
    start.push_to_hub("me/named", token="write-token", base_model="me/float", license="mit")
    data = card_of(hub, "me/named").data
    assert (data.base_model, data.license) == ("me/float", "mit")


def test_how_it_was_made_in_a_sentence(hub, tmp_path):
    images = [(IMAGE, torch.arange(2))] * 2
    mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, num_classes=5)
    mpq.quantize(bitops="W4A4", train=images, steps=1, indicator_options={"steps": 1}, validate=False)
    mpq.push_to_hub("me/made", token="write-token")
    text = card_of(hub, "me/made").text
    made = text[text.index("## How it was made") :]
    assert made.splitlines()[2] == (
        "Layers scored by `limpq` on 2 samples; policy searched for bitops W4A4; fine-tuned for 1 steps."
    )
    assert made.index("<details>") < made.index("| tool | hub-mpq") < made.index("</details>")


def usage_of(hub, name):
    """The first block of Python under Usage."""
    return re.search(r"## Usage.*?```python\n(.*?)```", card_of(hub, name).text, re.S)[1]


def test_the_first_lines_of_usage_run_from_an_image(hub, tmp_path, monkeypatch):
    timm_toy().push_to_hub("me/timm", token="write-token", float_copy=False)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (200, 180), (90, 20, 160)).save("image.jpg")
    names = {}
    exec(usage_of(hub, "me/timm"), names)  # noqa: S102
    assert names["y"].shape == (1, 5)
    assert names["transform"](Image.open("image.jpg")).shape == names["model"].graph.input_shape


def test_the_first_lines_of_usage_run_from_text(hub, tmp_path):
    float_bert(tmp_path / "float")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "sentence": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8", [{"input_ids": IDS}])
    mpq.push_to_hub("me/bert", token="write-token", float_copy=False)
    names = {}
    exec(usage_of(hub, "me/bert"), names)  # noqa: S102
    assert torch.equal(names["y"][0], mpq(torch.tensor([[0, 1, 0]]))[0])
    (tmp_path / "float" / "preprocessor_config.json").write_text("{}")  # images or sound beside the text
    HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8").push_to_hub("me/more", token="write-token")
    assert usage_of(hub, "me/more").splitlines()[-1] == "y = model(x)"
