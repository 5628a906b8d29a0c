"""A tiny timm model by its command-line options, a folder of images, indicators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_toys import LOADING, MODEL, images
from typer.testing import CliRunner


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run a command in this process; the result has exit_code, stdout, stderr."""
    from hub_mpq.cli import app

    def call(*args: object) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(scope="session")
def indicators(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Indicators of the tiny model, two steps long, made by the command itself."""
    from hub_mpq.cli import app

    path = tmp_path_factory.mktemp("indicators") / "indicators.safetensors"
    args = ["indicators", *MODEL, "--data", str(folder), "--output", str(path), "--steps", "2", *LOADING]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, folder: Path, indicators: Path) -> Path:
    """A packed folder of the tiny model, made by the command itself."""
    from hub_mpq.cli import app

    path = tmp_path_factory.mktemp("packed") / "model"
    args = ["quantize", *MODEL, "--data", str(folder), "--indicators", str(indicators), "--bitops", "W4A4"]
    result = CliRunner().invoke(app, [*args, "--steps", "1", "--output", str(path), *LOADING], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return path
