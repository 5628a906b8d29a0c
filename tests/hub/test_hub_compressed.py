"""compressed-tensors on the Hub: a process that never imports hub_mpq loads what was pushed."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from hub_toys import IDS, float_bert, timm_toy
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hub_mpq import HubMPQ, LayerBits, Policy
from hub_mpq.core.files import PACKED
from hub_mpq.errors import HubMPQError, InvalidArgument, PackedFormat
from hub_mpq.hub.publish import FLOAT_COPY, MANIFEST, publish
from hub_mpq.hub.pull import remote_manifest
from hub_mpq.pack import Manifest

pytestmark = pytest.mark.hub
NAME = "me/bert-ct"
PLAIN = """
import sys
import torch, transformers
want, ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    out = transformers.AutoModel.from_pretrained(sys.argv[1])(ids)[0]
assert not [m for m in sys.modules if m.startswith("hub_mpq")]
print(torch.equal(out, want))
"""


@pytest.fixture
def float_folder(tmp_path):
    float_bert(tmp_path / "float")
    return tmp_path / "float"


def mixed(mpq, tied=True):
    """Widths 2, 3, 4, … layer by layer, but for the layers of one tie."""
    first, bits = {}, {}
    for k, layer in enumerate(mpq.graph):
        width = 2 + k % 7
        group = layer.activation_tie if tied else None
        bits[layer.name] = LayerBits(first.setdefault(group, width) if group else width, 32)
    return Policy(bits, mpq.graph.digest)


def plain(hub, environment, tmp_path, want):
    torch.save((want, IDS), tmp_path / "want.pt")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, NAME, str(tmp_path / "want.pt")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_anybody_loads_it_without_this_package(hub, environment, tmp_path, float_folder):
    mpq = HubMPQ.from_pretrained(float_folder, weight_only=True)
    mpq.apply_policy(mixed(mpq))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing that vLLM could not read
        mpq.push_to_hub(NAME, token="write-token", format="compressed-tensors")
    there = hub.store.content(NAME)
    assert {"config.json", FLOAT_COPY, MANIFEST, "README.md", "tokenizer.json"} <= set(there)
    assert PACKED not in there
    assert Manifest.from_text(there[MANIFEST].decode()).policy == mpq.policy
    with torch.no_grad():
        assert plain(hub, environment, tmp_path, mpq(IDS)[0]) == "True"
    card = ModelCard(there["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert "compressed-tensors" in card.data.tags
    assert "hub-mpq is not needed" in card.text
    assert "must have one bit-width. Here all do." in card.text
    assert "from hub_mpq" not in card.text
    assert "dequantize=True" in card.text, "transformers 5.23 reads all widths as one with it"
    with pytest.raises(HubMPQError, match="already quantized"):
        HubMPQ.from_pretrained(NAME)
    manifest, size = remote_manifest(NAME)
    assert (manifest.policy, size) == (mpq.policy, len(there[FLOAT_COPY]))
    for bad in (b'{"base_model": 1}', b"\xff", there[MANIFEST].replace(b"W3A32", b"W9A32")):
        files = hub.store.repos[NAME].at("main").files
        hub.store.repos[NAME].refs["main"] = hub.store.repos[NAME].add(
            {**files, MANIFEST: hub.store.put(MANIFEST, bad)}
        )
        with pytest.raises(PackedFormat, match=MANIFEST):
            remote_manifest(NAME)


def test_versions_of_either_format_follow_each_other(hub, environment, tmp_path, float_folder):
    mpq = HubMPQ.from_pretrained(float_folder, weight_only=True).apply_policy("W4")
    mpq.push_to_hub(NAME, token="write-token")
    assert PACKED in hub.store.content(NAME)
    assert "push_to_hub" not in hub.store.content(NAME)["README.md"].decode(), "the hint is for the author"
    assert "loads it without hub-mpq" in mpq.report()
    for _ in range(2):
        mpq.push_to_hub(NAME, token="write-token", format="compressed-tensors")
        assert PACKED not in hub.store.content(NAME)
    mpq.save_pretrained(tmp_path / "saved")
    publish(tmp_path / "saved", NAME, token="write-token", format="compressed-tensors")
    with torch.no_grad():
        assert plain(hub, environment, tmp_path, mpq(IDS)[0]) == "True"
    mpq.push_to_hub(NAME, token="write-token", float_copy=False)
    assert not {MANIFEST, FLOAT_COPY} & set(hub.store.content(NAME))


def test_quantized_inputs_are_in_the_repo_and_the_card_says_who_reads_them(hub, environment, tmp_path, float_folder):
    mpq = HubMPQ.from_pretrained(float_folder).apply_policy("W8A8", [{"input_ids": IDS}])
    assert "loads it without hub-mpq" in mpq.report()
    mpq.push_to_hub(NAME, token="write-token", format="compressed-tensors")
    with torch.no_grad():
        assert plain(hub, environment, tmp_path, mpq(IDS)[0]) == "True"
    assert "quantized inputs" not in hub.store.content(NAME)["README.md"].decode()
    mpq.apply_policy("W4A4", [{"input_ids": IDS}])
    with pytest.warns(UserWarning, match="but vLLM cannot"):
        mpq.push_to_hub(NAME, token="write-token", format="compressed-tensors")
    with torch.no_grad():
        assert plain(hub, environment, tmp_path, mpq(IDS)[0]) == "True"
    text = hub.store.content(NAME)["README.md"].decode()
    assert "It cannot load the quantized inputs: it supports only 8-bit inputs" in text
    assert '"input_activations"' not in text
    assert "input_activations: {" in text, "the recipe"


def test_what_it_cannot_say_is_refused_before_anything_is_sent(hub, float_folder):
    assert "loads it without hub-mpq" not in timm_toy().report()
    with pytest.raises(HubMPQError, match="transformers models"):
        timm_toy().push_to_hub(NAME, token="write-token", format="compressed-tensors")
    mpq = HubMPQ.from_pretrained(float_folder, weight_only=True).apply_policy("W4")
    with pytest.raises(InvalidArgument, match="both write"):
        mpq.push_to_hub(NAME, token="write-token", format="compressed-tensors", float_copy=True)
    with pytest.raises(InvalidArgument, match="gguf"):
        mpq.push_to_hub(NAME, token="write-token", format="gguf")
    assert NAME not in hub.store.repos


def test_a_policy_that_vllm_cannot_fuse_is_told(hub, float_folder, tmp_path):
    mpq = HubMPQ.from_pretrained(float_folder, weight_only=True)
    mpq.apply_policy(mixed(mpq, tied=False))
    with pytest.warns(UserWarning, match='target="vllm"'):
        mpq.push_to_hub(NAME, token="write-token", format="compressed-tensors")
    assert "Here 2 groups of layers do not: vLLM cannot load this repo" in hub.store.content(NAME)["README.md"].decode()
    groups = json.loads(hub.store.content(NAME)["config.json"])["quantization_config"]["config_groups"]
    (tmp_path / "weights").write_bytes(hub.store.content(NAME)[FLOAT_COPY])
    keys = load_file(tmp_path / "weights")
    packed = {key.removesuffix(".weight_packed") for key in keys if key.endswith("weight_packed")}
    assert {name for group in groups.values() for name in group["targets"]} == packed
