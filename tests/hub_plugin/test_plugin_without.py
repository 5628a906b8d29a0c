"""What plain transformers and plain timm make of a published folder: right weights or an error, never random ones."""

from __future__ import annotations

import json
import shutil

import torch
from plugin_toys import build, pack, python
from safetensors.torch import save_file

from hub_mpq import HubMPQ
from hub_mpq.core.files import PACKED
from hub_mpq.core.library import libraries
from hub_mpq.export.float_copy import float_copy_state

PLAIN = """
import json, sys, warnings
warnings.simplefilter("ignore")
import timm, torch, transformers
from safetensors.torch import load_file
transformers.utils.logging.set_verbosity_error()
answers = {}
for row in json.loads(sys.argv[1]):
    try:
        if row["library"] == "timm":
            model = timm.create_model("local-dir:" + row["folder"], pretrained=True)
        else:
            model = getattr(transformers, row["cls"]).from_pretrained(row["folder"])
        inputs = load_file(row["inputs"])
        x = list(inputs.values()) if row["library"] == "timm" else []
        kw = {} if row["library"] == "timm" else inputs
        with torch.no_grad():
            out = model.eval()(*x, **kw)
        torch.save(out if isinstance(out, torch.Tensor) else out[0], row["inputs"] + ".out")
        answers[row["name"]] = "loaded"
    except Exception as error:
        answers[row["name"]] = f"{type(error).__name__}: {error}"
assert not [m for m in sys.modules if m.startswith("hub_mpq")]
print(json.dumps(answers))
"""


def row(root, name, folder, library, cls, inputs):
    file = root / f"{name}.inputs"
    save_file(inputs, file)
    return {**{"name": name, "folder": str(folder), "library": library, "cls": cls}, "inputs": str(file)}


def with_copy(folder, mpq, target):
    shutil.copytree(folder, target)
    save_file(
        float_copy_state(mpq.model, libraries.get(mpq.source.library)),
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    return target


def test_float_copy_or_an_error(tmp_path):
    rows, want = [], {}
    for kind in ("bert", "gpt2", "vit", "mixtral", "llama"):
        # weight-only but for fixed layers, whose inputs the copy does not quantize
        case = pack(tmp_path / kind, kind, "W3")
        rows.append(row(tmp_path, f"{kind} packed", case.folder, "hf", case.cls.__name__, case.inputs))
        copy = with_copy(case.folder, case.mpq, tmp_path / kind / "copy")
        rows.append(row(tmp_path, f"{kind} copy", copy, "hf", case.cls.__name__, case.inputs))
        exact = case.cls.from_pretrained(case.folder).dequantize()
        want[f"{kind} copy"] = case.logits(exact)
        own = case.cls.from_pretrained(copy)  # with the plug-in the copy changes nothing
        assert torch.equal(case.logits(own), case.logits())
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, num_classes=5)
    mpq.apply_policy("W3", [x]).save_pretrained(tmp_path / "timm")
    copy = with_copy(tmp_path / "timm", mpq, tmp_path / "timm copy")
    auto = "AutoModelForImageClassification"
    for name, folder in (("packed", tmp_path / "timm"), ("copy", copy)):
        rows.append(row(tmp_path, f"timm {name}", folder, "timm", "", {"x": x}))
        rows.append(row(tmp_path, f"wrapper {name}", folder, "hf", auto, {"pixel_values": x}))
    import timm

    float_timm = timm.create_model("test_resnet", num_classes=5)
    float_timm.load_state_dict(float_copy_state(mpq.model, libraries.get(mpq.source.library)))
    want["timm copy"] = want["wrapper copy"] = float_timm.eval()(x).detach()

    for name, source in (("timm", tmp_path / "timm"), ("bert", tmp_path / "bert" / "packed")):
        renamed = tmp_path / f"{name} renamed"  # somebody "repairs" the name of the packed file
        shutil.copytree(source, renamed)
        (renamed / PACKED).rename(renamed / "model.safetensors")
    rows.append(row(tmp_path, "timm renamed", tmp_path / "timm renamed", "timm", "", {"x": x}))
    rows.append(row(tmp_path, "wrapper renamed", tmp_path / "timm renamed", "hf", auto, {"pixel_values": x}))
    bert = build("bert")[1]
    rows.append(row(tmp_path, "bert renamed", tmp_path / "bert renamed", "hf", "BertForMaskedLM", bert))

    answers = json.loads(python(PLAIN, json.dumps(rows)))
    assert {name: text for name, text in answers.items() if name in want and text != "loaded"} == {}
    for name, logits in want.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.inputs.out"), logits), name
    refused = {name: text for name, text in answers.items() if name not in want}
    assert all(text != "loaded" for text in refused.values()), refused
    assert "model.safetensors" in refused["bert packed"]
    assert len(refused) == 10
    assert "mismatch" in refused["bert renamed"], "by the weight without elements"
