"""A quantized model as a Hub-shaped folder, and back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..core import Indicators
from ..core.files import CONFIG, INDICATORS, PACKED
from ..errors import HubMPQError
from ..nn.packing import config_of, packed_tensors
from ..pack import Manifest, read_indicators, write_indicators, write_packed


def save_folder(
    folder: str | os.PathLike[str],
    model: nn.Module,
    manifest: Manifest,
    config: Mapping[str, Any],
    indicators: Indicators | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> int:
    """Write config.json, the packed file and, if given, indicators and extra files; returns the packed bytes.

    Everything is written beside the folder first and moved in at the end, the packed file last: a failure leaves
    what was there. Raises HubMPQError when the disk refuses.
    """
    target = Path(folder)
    quantization = {
        "quant_method": "mpq",
        "format_version": manifest.format_version,
        "policy": manifest.policy.to_dict(),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise HubMPQError(f"{target} is a file; save_pretrained writes a folder")
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise HubMPQError(f"{target} cannot be written: {error}") from error
    try:
        for name, content in (extra or {}).items():
            (work / name).write_bytes(content)
        public = {k: v for k, v in config_of(model, config).items() if k != "_name_or_path"}  # a path on this machine
        text = json.dumps({**public, "quantization_config": quantization}, indent=2, sort_keys=True) + "\n"
        (work / CONFIG).write_text(text)
        if indicators is not None:
            write_indicators(work / INDICATORS, indicators)
        size = write_packed(work / PACKED, packed_tensors(model, manifest), manifest)
        target.mkdir(exist_ok=True)
        if indicators is None:  # those of another model must not stay
            (target / INDICATORS).unlink(missing_ok=True)
        for path in sorted(work.iterdir(), key=lambda p: p.name == PACKED):
            os.replace(path, target / path.name)
    except OSError as error:
        raise HubMPQError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return size


def read_folder_indicators(folder: str | os.PathLike[str]) -> Indicators | None:
    """Indicators stored in a folder, None when there are none."""
    path = Path(folder) / INDICATORS
    return read_indicators(path) if path.is_file() else None
