"""A Hub of its own for every test, and the real client pointed at it."""

import hashlib
import time
from types import SimpleNamespace

import pytest
import torch
from server import Hub
from store import Store

from hub_mpq import HubMPQ

TOKENS = {"write-token": ("me", True), "read-token": ("me", False), "other-token": ("you", True)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, empty, with the client of this process pointed at it, online, with a cache of its own."""
    from huggingface_hub import constants

    (tmp_path / "blobs").mkdir()
    server = Hub(Store(tmp_path / "blobs", dict(TOKENS)))
    server.cache = tmp_path / "cache"
    settings = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(server.cache),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


@pytest.fixture
def environment(hub, tmp_path):
    """Environment of a fresh process that talks to the server."""
    import os

    out = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    return {
        **out,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def x():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mpq(net, x):
    """A quantized network of one's own."""
    return HubMPQ.from_module(net, x[:1], model_id="toy").apply_policy("W4A8", [x])


@pytest.fixture
def other(net, x):
    """Another version of `mpq`."""
    return HubMPQ.from_module(net, x[:1], model_id="toy").apply_policy("W3A8", [x])


def digests(folder):
    """{path: SHA-256} of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def no_waits(monkeypatch):
    """The client's pauses between its attempts take no time."""
    quick = SimpleNamespace(**{k: getattr(time, k) for k in dir(time) if not k.startswith("_")})
    quick.sleep = lambda seconds: None
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
    monkeypatch.setattr("huggingface_hub.file_download.time", quick)
    monkeypatch.setattr("hub_mpq.hub.publish._draw", lambda manifest, path: False)
