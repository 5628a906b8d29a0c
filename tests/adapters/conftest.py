"""No network and an empty cache, so that every test builds from names and configs alone."""

import json

import huggingface_hub.constants
import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Write a transformers config to a folder: folder(BertConfig(…), "BertModel")."""

    def write(config, architecture):
        path = tmp_path / architecture
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": [architecture]}))
        return str(path)

    return write
