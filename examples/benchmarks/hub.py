"""Publish a model to a stand-in for the Hub on loopback, and pull it as each audience would in a fresh process.

The client and its HTTP are real; the server is that of tests/hub. Seconds over loopback exclude the network; bytes are
what a network would carry.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "hub")]

_OURS = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import nets
from hub_mpq import HubMPQ
audience, repo, data, build = sys.argv[2:6]
inputs, want = torch.load(data, weights_only=True)
torch.set_num_threads(1)
net = getattr(nets, build)() if build else None
if audience != "HubMPQ":
    import transformers
began = time.perf_counter()
if audience == "HubMPQ":
    model = HubMPQ.from_pretrained(repo, module=net)
else:
    model = getattr(transformers, audience.split()[0]).from_pretrained(repo)
seconds = time.perf_counter() - began
"""
_PLAIN = """
import json, sys, time
import torch
audience, repo, data, build = sys.argv[2:6]
inputs, want = torch.load(data, weights_only=True)
torch.set_num_threads(1)
import timm, transformers
began = time.perf_counter()
if audience.startswith("timm"):
    model = timm.create_model("hf-hub:" + repo, pretrained=True)
else:
    model = getattr(transformers, audience.split()[0]).from_pretrained(repo)
seconds = time.perf_counter() - began
assert not [name for name in sys.modules if name.startswith("hub_mpq")]
"""
_ANSWER = """
with torch.no_grad():
    out = model.eval()(**inputs) if isinstance(inputs, dict) else model.eval()(inputs)
out = out if isinstance(out, torch.Tensor) else out[0]
print(json.dumps({"equal": torch.equal(out, want), "seconds": seconds}))
"""


@contextmanager
def loopback() -> Iterator[tuple[Any, Path]]:
    """Yield (server, folder); the clients of this process and of its children use the server.

    Enter it before huggingface_hub is imported, which reads the environment once.
    """
    from server import Hub
    from store import Store

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "blobs").mkdir()
        hub = Hub(Store(root / "blobs", {"token": ("me", True)}))
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
        os.environ |= {"HF_TOKEN": "token", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        try:
            yield hub, root
        finally:
            hub.close()


@dataclass(frozen=True)
class Row:
    """One step: bytes as counted by the server, and wall seconds."""

    step: str
    bytes_up: int
    bytes_down: int
    seconds: float


def publish_and_pull(
    hub: Any, root: Path, name: str, mpq: Any, inputs: Any, *, build: str = "", card: dict[str, Any]
) -> list[Row]:
    """Push the float model, the packed one and, where a plain loader exists, a float copy; pull as every audience.

    `build`: function of nets.py that builds a custom network. `card`: argument of push_to_hub. SystemExit when the
    outputs of a pulled model are not bit-identical to those of the pushed one (for plain loads of a float copy: of the
    float architecture with its weights).
    """
    import torch
    from huggingface_hub import HfApi
    from safetensors.torch import save_file

    from hub_mpq.core.library import libraries
    from hub_mpq.export.float_copy import float_copy_state

    rows: list[Row] = []
    library = mpq.graph.library

    def timed(step: str, call: Callable[[], object]) -> None:
        up, down, began = hub.bytes_up(), hub.bytes_down(), time.perf_counter()
        call()
        rows.append(Row(step, hub.bytes_up() - up, hub.bytes_down() - down, time.perf_counter() - began))

    api = HfApi(token="token")
    save_file(float_state(mpq.float_model), root / "model.safetensors", metadata={"format": "pt"})

    def push_float() -> None:
        api.create_repo(f"me/{name}-float")
        api.upload_file(
            path_or_fileobj=root / "model.safetensors", path_in_repo="model.safetensors", repo_id=f"me/{name}-float"
        )

    timed("push the float model", push_float)
    repo = f"me/{name}"
    timed("push packed", lambda: mpq.push_to_hub(repo, token="token", float_copy=False, **card))
    audiences = [("HubMPQ", "")]
    compressed = "format" in card
    if compressed:  # a single format, which needs no hub_mpq
        audiences = [("AutoModel without", "plain")]
    elif library != "module":
        auto = "AutoModel" if library == "transformers" else "AutoModelForImageClassification"
        timed("push the float copy too", lambda: mpq.push_to_hub(repo, token="token", float_copy=True, **card))
        audiences += [(f"{auto} with hub_mpq", ""), (f"{auto} without", "plain")]
        audiences += [("timm without", "plain")] if library == "timm" else []
    with torch.no_grad():
        own = _first(mpq.eval()(**inputs) if isinstance(inputs, dict) else mpq.eval()(inputs))
        plain = mpq.float_model
        before = {k: v.clone() for k, v in plain.state_dict().items()}
        plain.load_state_dict(float_copy_state(mpq.model, libraries.get(mpq.source.library)), strict=False)
        copied = _first(plain.eval()(**inputs) if isinstance(inputs, dict) else plain.eval()(inputs))
        plain.load_state_dict(before)
    for audience, kind in audiences:
        torch.save((inputs, copied if kind and not compressed else own), root / "want.pt")
        home = tempfile.mkdtemp(dir=root)
        down, code = hub.bytes_down(), (_PLAIN if kind else _OURS) + _ANSWER
        done = subprocess.run(
            [sys.executable, "-c", code, str(HERE), audience, repo, str(root / "want.pt"), build],
            env={**os.environ, "HF_HOME": home},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{name}: {audience} failed: {done.stderr[-2000:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        if not answer["equal"]:
            raise SystemExit(f"{name}: pulled by {audience}, the model gives other outputs than the pushed one")
        rows.append(Row(f"pull by {audience}, equal", 0, hub.bytes_down() - down, answer["seconds"]))
    return rows


def float_state(model: Any) -> dict[str, Any]:
    """Return the state dict of a model with every tensor in separate memory."""
    return {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}


def _first(output: Any) -> Any:
    return output if hasattr(output, "shape") else output[0]
