"""Packed files of a hostile author: refused in a sentence, or what loads is what the file says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.core.files import CONFIG, PACKED
from hub_mpq.errors import HubMPQError, PackedFormat

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def hostile():
    """The benchmark, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("hostile_files", BENCHMARKS / "hostile_files.py")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return found


@pytest.mark.parametrize("kind", ["conv", "text"])
@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGALRM"), reason="there is no alarm here")
def test_mutants_are_refused_or_are_what_the_file_says(hostile, kind, tmp_path):
    mpq = HubMPQ.from_module(hostile.network(kind, 0), (hostile.example(kind)[:1],)).apply_policy("W4A4")
    mpq.save_pretrained(tmp_path / kind)
    found = hostile.run_mutants(kind, tmp_path / kind, 300, seed=11, root=tmp_path)
    verdicts = Counter()
    for (_, verdict), many in found.items():
        verdicts[verdict] += many
    assert set(verdicts) == {"refused", "loaded"}, found
    assert min(verdicts.values()) > 20


def test_a_folder_costs_nothing_before_it_is_refused():
    """At most 3 times the packed file and 300 MB above the imports, and 20 s of CPU."""
    command = [sys.executable, str(BENCHMARKS / "hostile_files.py"), "--bombs"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert len(rows) > 20
    for what, kilobytes, megabytes, seconds, answer in rows:
        assert float(kilobytes) <= 200, what
        assert float(megabytes) <= 300 + 3 * float(kilobytes) / 1000, what
        assert float(seconds) <= 20, what
        assert answer.startswith(("refused: ", "loaded ")), (what, answer)
    loaded = {what for what, *_, answer in rows if answer.startswith("loaded ")}
    assert loaded == {
        *(f"control: {kind}, unchanged" for kind in ("timm", "bert", "vit", "swin", "neo")),
        "input_size [3, 20000, 20000]",  # the packed file says which input it is
        "input of the manifest [1e12]",  # as many tokens as the network takes
        "12,000 keys of provenance",
    }


class Tied(nn.Module):
    """A head with the embedding's weight, unless it is untied."""

    def __init__(self, tied=True):
        super().__init__()
        self.emb, self.body, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(torch.relu(self.body(self.emb(ids))))


def test_a_network_shares_the_weights_that_the_file_says(tmp_path):
    ids = torch.arange(6)[None]
    for tied in (True, False):
        mpq = HubMPQ.from_module(Tied(tied), (ids,)).apply_policy("W4A4")
        mpq.save_pretrained(tmp_path / str(tied))
        again = HubMPQ.from_pretrained(tmp_path / str(tied), module=Tied(tied))
        assert torch.equal(again(ids), mpq(ids))
        with pytest.raises(
            PackedFormat, match=r"layer 'head' shares the weight of '(emb|head)', but in the network that of"
        ):
            HubMPQ.from_pretrained(tmp_path / str(tied), module=Tied(not tied))


class Mixed(nn.Module):
    """A norm and two linear layers."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.b(self.norm(self.a(x).float()).to(self.b.bias.dtype))


@pytest.mark.parametrize(
    ("change", "loads"),
    [
        (lambda net: net, True),
        (lambda net: net.double(), True),
        (lambda net: net.bfloat16(), True),
        (lambda net: (net.bfloat16(), net.norm.float()), True),
        (lambda net: net.norm.half(), False),
        (lambda net: net.b.half(), False),
        (lambda net: net.register_buffer("steps", torch.zeros((), dtype=torch.int32)), False),
    ],
)
def test_dtypes_that_a_network_cant_compute_in_are_refused(change, loads, tmp_path, monkeypatch):
    net = Mixed().eval()
    mpq = HubMPQ.from_module(net, (torch.randn(1, 4),)).apply_policy("W4A4")
    change(mpq.model)
    mpq.save_pretrained(tmp_path)
    if loads:
        HubMPQ.from_pretrained(tmp_path, module=Mixed())
    else:
        with pytest.raises(PackedFormat, match="does not fit the network's"):
            HubMPQ.from_pretrained(tmp_path, module=Mixed())


def test_a_scale_beyond_all_weights_is_refused_when_it_is_loaded(hostile, tmp_path):
    from hub_mpq.pack import PackedTensor, read_packed, write_packed

    mpq = HubMPQ.from_module(hostile.network("conv", 0), (hostile.IMAGE[:1],)).apply_policy("W4A4")
    mpq.save_pretrained(tmp_path)
    tensors, manifest = read_packed(tmp_path / PACKED)
    packed = next(t for t in tensors.values() if isinstance(t, PackedTensor))
    packed.weight_scale.fill_(3e38)
    write_packed(tmp_path / PACKED, tensors, manifest)
    with pytest.raises(PackedFormat, match="NaN or infinite"):
        HubMPQ.from_pretrained(tmp_path, module=hostile.network("conv", 1))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_labels": 10**9}, "num_labels is 1000000000, but the packed file does not hold a network of that size"),
        ({"a": [{"deep": [1, 10**400]}]}, "deep is 10000"),
        ({"drop": float("nan")}, "drop is NaN"),
        ({"\x1b[2J" * 99: 10**9}, r"\\x1b\[2J.* is 1000000000"),
    ],
)
def test_numbers_of_a_config(hostile, tmp_path, change, match):
    folder = _timm(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(PackedFormat, match=match) as error:
        HubMPQ.from_pretrained(folder)
    assert len(str(error.value).removeprefix(str(folder))) < 250


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, '{"a":' * 10**5, "\x00", "\ufeff{}", "null", "[1]", '"x"'])
def test_a_config_that_is_no_object(tmp_path, text):
    folder = _timm(tmp_path)
    (folder / CONFIG).write_text(text)
    with pytest.raises(HubMPQError) as error:
        HubMPQ.from_pretrained(folder)
    assert re.fullmatch(r".{,500}", str(error.value))


def _timm(root):
    mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, num_classes=4, input_size=(3, 32, 32))
    mpq.apply_policy("W4A32").save_pretrained(root / "packed")
    return root / "packed"


def test_a_folder_is_loaded_without_running_it(tmp_path, monkeypatch):
    """What a stranger's config makes of a forward is nobody's business before the model is used."""
    import timm

    folder = _timm(tmp_path)
    monkeypatch.setattr(timm.models.resnet.ResNet, "forward", lambda *args: pytest.fail("it ran"))
    assert HubMPQ.from_pretrained(folder).graph.input_shape == (3, 32, 32)


def test_a_hub_id_that_is_none_is_no_crash(tmp_path):
    folder = _timm(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    config["pretrained_cfg"]["hf_hub_id"] = "../../etc/x"
    (folder / CONFIG).write_text(json.dumps(config))
    HubMPQ.from_pretrained(folder)
