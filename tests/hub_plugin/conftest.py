"""Packed folders that several tests read and none changes."""

from __future__ import annotations

from typing import Any

import pytest
from plugin_toys import Packed, pack


@pytest.fixture(scope="session", params=["bert", "gpt2", "vit", "mixtral", "llama", "t5"])
def packed(request: Any, tmp_path_factory: Any) -> Packed:
    return pack(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: Any) -> Packed:
    return pack(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: Any) -> Packed:
    return pack(tmp_path_factory.mktemp("gpt2"), "gpt2")
