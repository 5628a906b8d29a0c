"""Declared versions: what is newer than anything tested is said once, and the bounds agree with each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from hub_mpq import HubMPQ, MPQConfig, versions
from hub_mpq.adapters import load
from hub_mpq.core.library import libraries
from hub_mpq.data import image_loader
from hub_mpq.export.float_copy import float_copy_state
from hub_mpq.hub.remote import hub_api
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune, fit
from hub_mpq.train.processes import seeded
from hub_mpq.versions import NEWEST_TESTED, warn_if_untested

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


@pytest.fixture(autouse=True)
def forget():
    """The line comes once in a process; each test here begins a new one."""
    warn_if_untested.cache_clear()
    yield
    warn_if_untested.cache_clear()


def install(monkeypatch, **installed):
    plain = versions.version
    monkeypatch.setattr(versions, "version", lambda name: installed.get(name) or plain(name))


def log_lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hub_mpq.versions"]


def after(library):
    *first, last = NEWEST_TESTED[library]
    return ".".join(map(str, (*first, last + 1)))


@pytest.mark.parametrize("library", NEWEST_TESTED)
def test_a_newer_minor_is_told_once(monkeypatch, caplog, library):
    install(monkeypatch, **{library: f"{after(library)}.0.dev0+local"})
    for _ in range(3):
        warn_if_untested(library)
    (line,) = log_lines(caplog)
    tested = ".".join(map(str, NEWEST_TESTED[library]))
    assert f"{library} and was tested up to {tested}, but {after(library)}.0.dev0+local is installed" in line


@pytest.mark.parametrize("library", NEWEST_TESTED)
def test_newer_patches_and_older_minors_are_not(monkeypatch, caplog, library):
    newest = ".".join(map(str, NEWEST_TESTED[library]))
    for installed in (newest, f"{newest}.99", f"{newest}rc1", f"{NEWEST_TESTED[library][0] - 1}.999"):
        install(monkeypatch, **{library: installed})
        warn_if_untested(library)
        assert log_lines(caplog) == []
        warn_if_untested.cache_clear()


def test_the_first_of_several_processes_tells(monkeypatch, caplog):
    install(monkeypatch, torch="999.0")
    monkeypatch.setenv("RANK", "1")
    warn_if_untested("torch")
    assert log_lines(caplog) == []


def test_it_is_one_line_on_stderr():
    code = (
        "from hub_mpq import versions; versions.version = lambda name: '999.0'\n"
        "versions.warn_if_untested('torch'); versions.warn_if_untested('torch')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("hub_mpq uses private interfaces of torch ")


def nothing(net, path):
    return path


def packed(net, path):
    x = torch.ones(2, 1, 8, 8)
    HubMPQ.from_module(net, x[:1]).apply_policy("W4A8", [x]).save_pretrained(path)
    return path


def bert(net, path):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(**config, vocab_size=40)).save_pretrained(path)
    return str(path)


def packed_bert(net, path):
    HubMPQ.from_pretrained(bert(net, path / "float")).apply_policy("W4A32").save_pretrained(path / "packed")
    return path / "packed"


def model_of_transformers(net, path):
    return load(bert(net, path)).model


def images(net, path):
    (path / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(path / "cat" / "0.png")
    return path


def train(net, path):
    options = Finetune(task=Classification(), lr=1e-3, scale_lr=1e-3, weight_decay=0.0, smoothing=0.0)
    fit(net, options, [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))], steps=1)


DATA = {"input_size": (3, 8, 8), "interpolation": "bilinear", "crop_pct": 1.0}
ROUTES = {  # {route: (library whose interfaces it uses, what was there before, what a user does)}
    "trace a network": ("torch", nothing, lambda net, _: HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8))),
    "load a packed network": ("torch", packed, lambda net, path: HubMPQ.from_pretrained(path, module=net)),
    "build a timm model": ("timm", nothing, lambda *_: load("test_resnet", pretrained=False)),
    "read images": ("timm", images, lambda _, path: image_loader(path, DATA, train=False)),
    "load a transformers model": ("transformers", bert, lambda _, path: load(path)),
    "quantize while loading": (
        "transformers",
        bert,
        lambda _, path: transformers.AutoModel.from_pretrained(path, quantization_config=MPQConfig("W4A32")),
    ),
    "load a packed transformers model": (
        "torch",
        packed_bert,
        lambda _, path: transformers.AutoModel.from_pretrained(path),
    ),
    "write a float copy": (
        "transformers",
        model_of_transformers,
        lambda _, model: float_copy_state(model, libraries.get("transformers")),
    ),
    "shuffle by a seed": (
        "accelerate",
        nothing,
        lambda *_: seeded(DataLoader(TensorDataset(torch.zeros(4)), shuffle=True)),
    ),
    "talk to the Hub": ("huggingface_hub", nothing, lambda *_: hub_api()),
    "train": ("accelerate", nothing, train),
}


@pytest.mark.parametrize("route", ROUTES)
def test_it_comes_where_private_interfaces_are_used(monkeypatch, caplog, net, tmp_path, route):
    library, prepare, use = ROUTES[route]
    path = prepare(net, tmp_path / "files")
    caplog.clear()
    warn_if_untested.cache_clear()
    install(monkeypatch, **{library: "999.0"})
    use(net, path)
    assert len([line for line in log_lines(caplog) if f"interfaces of {library} " in line]) == 1


def numbers(text):
    return tuple(map(int, text.split(".")))


def bounds():
    """{library: (floor, cap)} of the requirements, as tuples of numbers."""
    text = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.M | re.S)[1]
    rows = re.findall(r'"([\w-]+)>=([\d.]+),<(\d+)"', text)
    assert len(rows) == text.count('"') // 2, "a requirement without a floor and a cap"
    return {name.replace("-", "_"): (numbers(low), (int(cap),)) for name, low, cap in rows}


def test_every_extra_but_the_benchmarks_has_floors_and_caps():
    """The floors are what .ci/run installs; a major release that nobody has run must not be picked up."""
    extras = PROJECT[PROJECT.index("[project.optional-dependencies]") : PROJECT.index("[project.scripts]")]
    extras = re.sub(r"^bench = .*$", "", extras, flags=re.M)
    wanted = [text for text in re.findall(r'"([^"]+)"', extras) if not text.startswith("hub-mpq[")]
    assert len(wanted) > 10
    for text in wanted:
        floor, cap = re.fullmatch(r"[\w-]+>=([\d.]+),<([\d.]+)", text).groups()
        assert numbers(floor) < numbers(cap)


def test_what_was_tested_lies_within_the_declared_bounds():
    declared = bounds()
    for library, newest in NEWEST_TESTED.items():
        floor, cap = declared[library]
        assert floor <= newest < cap
        assert cap == (newest[0] + 1,), "the cap is the next major"


def test_the_documents_say_the_same():
    text = (Path(__file__).parents[1] / ".github" / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \|", text, re.M)
    declared = bounds()
    assert {name.replace("-", "_") for name, _, _ in rows} == set(declared)
    for name, floor, newest in rows:
        library = name.replace("-", "_")
        assert numbers(floor) == declared[library][0], name
        if library in NEWEST_TESTED:
            assert numbers(newest) == NEWEST_TESTED[library], name
