"""A library that the package knows nothing of works everywhere once it is registered, and nowhere before."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hub_mpq import HubMPQ
from hub_mpq.adapters import Source, build_graph, load
from hub_mpq.cli import app
from hub_mpq.core.files import CONFIG, PACKED
from hub_mpq.core.library import Library, libraries, register_library
from hub_mpq.errors import HubMPQError, InvalidArgument, PackedFormat
from hub_mpq.hub.card import CardFacts, render_card
from hub_mpq.hub.publish import publish
from hub_mpq.pack import read_manifest, read_packed, write_packed

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))


class Toy(Library):
    """The least that a library has to say: a name, its ids, its config.json, and how to build."""

    name = "toy"

    def __init__(self) -> None:
        self.built: list[tuple[str, bool]] = []

    def knows(self, model_id: str) -> bool:
        return model_id.startswith("toy:")

    def owns(self, config: Any) -> bool:
        return config.get("toy") is True

    def load(self, model_id: str, *, pretrained: bool, meta: bool, exclude: Any = (), **kwargs: Any) -> Source:
        if kwargs:
            raise InvalidArgument(f"toy takes no {', '.join(kwargs)}")
        self.built.append((model_id, meta))
        with torch.random.fork_rng(), torch.device("meta") if meta else contextlib.nullcontext():
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
            )
        example = (torch.zeros(1, 1, 8, 8),)
        graph = build_graph(net.eval(), example, model_id=model_id, library=self.name, exclude=exclude)
        return Source(net, model_id, None, self.name, example, graph, config={"toy": True})


@pytest.fixture
def toy() -> Iterator[Toy]:
    yield register_library(Toy())
    libraries.unregister("toy")


@pytest.fixture
def saved(toy: Toy, tmp_path: Path) -> tuple[HubMPQ, Path]:
    """(a quantized toy model, the folder it was saved to)."""
    mpq = HubMPQ.from_pretrained("toy:tiny", pretrained=False).apply_policy("W3A4", [X])
    mpq.save_pretrained(tmp_path / "packed")
    return mpq, tmp_path / "packed"


def test_an_id_becomes_a_folder_and_the_folder_the_same_model(saved, toy):
    mpq, folder = saved
    assert mpq.graph.library == "toy"
    assert "toy:tiny" in mpq.report()
    config = json.loads((folder / CONFIG).read_text())
    assert config["toy"] is True
    assert config["quantization_config"]["quant_method"] == "mpq"
    toy.built.clear()
    again = HubMPQ.from_pretrained(folder)
    assert toy.built == [(str(folder), True), (str(folder), False)]  # the skeleton that is checked, the network
    assert again.source.library == "toy"
    assert torch.equal(again.model(X), mpq.model(X))
    again.save_pretrained(folder.with_name("twice"))
    assert (folder.with_name("twice") / PACKED).read_bytes() == (folder / PACKED).read_bytes()


def test_a_search_needs_nothing_else_of_a_library(toy):
    mpq = HubMPQ.from_pretrained("toy:tiny", pretrained=False, fixed={"*": None})
    batches = [(X, torch.tensor([0, 1, 2, 3]))]
    mpq.quantize(train=batches, epochs=0, size="W4", indicator_options={"steps": 1}, candidates=(3, 4, 5))
    assert mpq.result is not None
    assert mpq.usage()["size"] <= mpq.usage("W4A4")["size"]  # inputs have scales too


def test_a_folder_is_known_by_its_config(toy, tmp_path):
    (tmp_path / CONFIG).write_text('{"toy": true}')
    assert load(str(tmp_path), meta=True).library == "toy"
    (tmp_path / CONFIG).write_text('{"toy": false}')
    with pytest.raises(InvalidArgument, match="no registered library; expected timm or transformers or toy"):
        load(str(tmp_path), meta=True)


def test_the_command_line_inspects_an_id_and_a_folder(saved):
    mpq, folder = saved
    found = CliRunner().invoke(app, ["inspect", "toy:tiny", "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.stderr
    tree = json.loads(found.stdout)
    assert (tree["library"], [row["name"] for row in tree["layers"]]) == ("toy", ["0", "2", "5"])
    found = CliRunner().invoke(app, ["inspect", str(folder), "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.stderr
    tree = json.loads(found.stdout)
    assert tree["library"] == "toy"
    assert tree["usage"]["size"] == (folder / PACKED).stat().st_size
    assert tree["policy"] == mpq.policy.to_dict()


def test_a_card_tells_only_of_ways_to_load_that_the_library_has(saved):
    _, folder = saved
    manifest = read_manifest(folder / PACKED)
    card = render_card("me/toy", manifest, CardFacts({PACKED: 1000, "model.safetensors": 4000}))
    assert "- toy\n" in card
    assert 'HubMPQ.from_pretrained("me/toy")' in card
    assert "transformers" not in card
    assert "alone" not in card


@pytest.mark.parametrize("name", ["toy", "`<b>\n" * 60])
def test_a_folder_of_a_library_that_nobody_registered_is_refused(saved, name, monkeypatch):
    import hub_mpq.adapters

    mpq, folder = saved
    tensors, manifest = read_packed(folder / PACKED)
    write_packed(folder / PACKED, tensors, replace(manifest, library=name))
    libraries.unregister("toy")
    monkeypatch.setattr(hub_mpq.adapters, "load", None)  # not even the skeleton is built
    for refused in (lambda: HubMPQ.from_pretrained(folder), lambda: publish(folder, "me/toy")):
        with pytest.raises(PackedFormat) as error:
            refused()
        assert f"library {name[:40]!r} is unknown; registered libraries: timm, transformers, module" in str(error.value)
    assert torch.equal(HubMPQ.from_pretrained(folder, module=mpq.float_model).model(X), mpq.model(X))
    found = CliRunner().invoke(app, ["inspect", str(folder), "--json"], catch_exceptions=False)
    assert json.loads(found.stdout)["library"] == "toy"  # the header of a file needs no library


def test_names_of_libraries(toy):
    with pytest.raises(InvalidArgument, match="unknown library 'jax'; choose from timm, transformers, module, toy"):
        load("resnet18", library="jax")
    with pytest.raises(InvalidArgument, match="pass the network itself"):
        load("resnet18", library="module")
    register_library(Toy())  # the class of the same name: a cell of a notebook that runs again
    with pytest.raises(InvalidArgument, match="is already registered"):
        register_library(type("Another", (Toy,), {})())
    with pytest.raises(InvalidArgument, match="is a built-in library of hub_mpq"):
        register_library(type("Own", (Toy,), {"name": "timm"})())
    libraries.unregister("toy")
    with pytest.raises(HubMPQError, match="toy:tiny"):
        HubMPQ.from_pretrained("toy:tiny", pretrained=False)


def test_looking_up_a_library_imports_none():
    """Not their packages: those come with the first model of theirs, or with a name that only timm can tell."""
    code = (
        "import sys; from hub_mpq.core.library import libraries as known\n"
        "assert 'torch' not in sys.modules\n"
        "names = known.names(); known.get('timm').knows('org/name'); known.get('timm').plugin_code('a/b', {})\n"
        "print(names, [m for m in ('timm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['timm', 'transformers', 'module'] []"
