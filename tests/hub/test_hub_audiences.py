"""Fresh processes load what was pushed: with this package, and without it right weights or an error."""

import json
import subprocess
import sys

import pytest
import torch
from hub_toys import IDS, IMAGE, float_bert, timm_toy

from hub_mpq import HubMPQ
from hub_mpq.core.files import PACKED
from hub_mpq.core.library import libraries
from hub_mpq.export.float_copy import float_copy_state
from hub_mpq.hub.publish import FLOAT_COPY

pytestmark = pytest.mark.hub

PLAIN = """
import json, sys, warnings
warnings.simplefilter("ignore")
import timm, torch, transformers
data = torch.load(sys.argv[1], weights_only=True)
answers = {}
def attempt(name, load, *args, **kwargs):
    try:
        out = load().eval()(*args, **kwargs)
        out = out if isinstance(out, torch.Tensor) else out[0]
        answers[name] = torch.equal(out, data[name])
    except Exception as error:
        answers[name] = type(error).__name__
with torch.no_grad():
    for name in ("copy", "packed"):
        uri = f"hf-hub:me/timm-{name}"
        attempt(f"timm {name}", lambda: timm.create_model(uri, pretrained=True), data["image"])
        attempt(f"bert {name}", lambda: transformers.AutoModel.from_pretrained(f"me/bert-{name}"), data["ids"])
assert not [m for m in sys.modules if m.startswith("hub_mpq")]
print(json.dumps(answers))
"""

OURS = """
import contextlib, json, os, sys, urllib.request
import torch
from hub_mpq import HubMPQ
data, revisions = torch.load(sys.argv[1], weights_only=True), json.loads(sys.argv[2])
def loaded():
    image = HubMPQ.from_pretrained("me/timm-copy", revision=revisions["me/timm-copy"])
    bert = HubMPQ.from_pretrained("me/bert-packed", revision=revisions["me/bert-packed"])
    with torch.no_grad():
        yield torch.equal(image(data["image"]), data["timm own"])
        yield torch.equal(bert(data["ids"])[0], data["bert own"])
same = list(loaded())
import transformers
plugged = transformers.AutoModel.from_pretrained("me/bert-packed", revision=revisions["me/bert-packed"])
with torch.no_grad():
    same.append(torch.equal(plugged(data["ids"])[0], data["bert own"]))
with contextlib.suppress(OSError):
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/from-here-on-nothing")
same += loaded()
print(json.dumps(same))
"""


def run(code, environment, *args):
    done = subprocess.run([sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_every_audience(hub, environment, tmp_path):
    float_bert(tmp_path / "float")
    bert = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8")
    image = timm_toy()
    commits = {}
    for name, mpq in (("timm", image), ("bert", bert)):
        commits[f"me/{name}-copy"] = mpq.push_to_hub(f"me/{name}-copy", token="write-token").oid
        done = mpq.push_to_hub(f"me/{name}-packed", token="write-token", float_copy=False)
        commits[f"me/{name}-packed"] = done.oid
    assert FLOAT_COPY in hub.store.content("me/timm-copy"), "by default where a plain loader exists"
    import timm
    import transformers

    plain_timm = timm.create_model("test_resnet", num_classes=5).eval()
    plain_timm.load_state_dict(float_copy_state(image.model, libraries.get("timm")))
    plain_bert = transformers.AutoModel.from_pretrained(tmp_path / "float").eval()
    plain_bert.load_state_dict(float_copy_state(bert.model, libraries.get("transformers")))
    with torch.no_grad():
        data = {
            "image": IMAGE,
            "ids": IDS,
            "timm copy": plain_timm(IMAGE),
            "bert copy": plain_bert(IDS)[0],
            "timm own": image(IMAGE),
            "bert own": bert(IDS)[0],
        }
    assert not torch.equal(data["timm copy"], data["timm own"]), "the copy's activations are float"
    torch.save(data, tmp_path / "data.pt")

    answers = run(PLAIN, environment, str(tmp_path / "data.pt"))
    assert answers["timm copy"] is True
    assert answers["bert copy"] is True
    assert answers["bert packed"] == "OSError"
    assert "Error" in str(answers["timm packed"])
    assert not hub.count("GET", PACKED), "nobody without the package reads the packed file"

    hub.seen.clear()
    assert run(OURS, environment, str(tmp_path / "data.pt"), json.dumps(commits)) == [True] * 5
    assert not hub.count("GET", FLOAT_COPY)
    assert hub.seen[-1].path == "/from-here-on-nothing", "pinned and in the cache: no request"
