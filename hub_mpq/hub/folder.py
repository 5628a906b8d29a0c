"""A quantized model as a folder in the layout of a Hub repo, and back."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..core import Indicators
from ..core.files import CONFIG, INDICATORS, PACKED
from ..core.output import check_output_folder
from ..errors import PackedFormat
from ..nn.packing import config_of, packed_tensors
from ..pack import Manifest, read_indicators, write_indicators, write_packed
from ..pack.atomic_folder import atomic_folder


def save_folder(
    folder: str | os.PathLike[str],
    model: nn.Module,
    manifest: Manifest,
    config: Mapping[str, Any],
    indicators: Indicators | None = None,
    extra: Mapping[str, bytes] | None = None,
    drop: Collection[str] = (),
) -> int:
    """Write config.json, the packed file and, if given, indicators and extra files, atomically.

    Readers see the old version or the new one, complete. Other files in the folder stay.

    Args:
        folder: Folder to write.
        model: The quantized model.
        manifest: What the packed file says about it.
        config: Content of config.json without the quantization.
        indicators: Scores to store; None removes those of an earlier save.
        extra: `{name: content}` of other files to write.
        drop: Names of files to remove.

    Returns:
        Bytes of the packed file.

    Raises:
        InvalidArgument: The folder cannot be written.
        HubMPQError: Writing fails, for example because the disk is full.
    """
    check_output_folder(folder, (CONFIG, PACKED, INDICATORS))
    quantization = {
        "quant_method": "mpq",
        "format_version": manifest.format_version,
        "policy": manifest.policy.to_dict(),
    }
    public = {k: v for k, v in config_of(model, config).items() if k != "_name_or_path"}  # a local path
    text = json.dumps({**public, "quantization_config": quantization}, indent=2, sort_keys=True) + "\n"
    gone = {*drop, INDICATORS} if indicators is None else drop  # those of another model must be removed
    with atomic_folder(folder, gone) as work:
        for name, content in (extra or {}).items():
            (work / name).write_bytes(content)
        (work / CONFIG).write_text(text, encoding="utf-8")
        if indicators is not None:
            write_indicators(work / INDICATORS, indicators)
        return write_packed(work / PACKED, packed_tensors(model, manifest), manifest)


def read_folder_indicators(folder: str | os.PathLike[str]) -> Indicators | None:
    """Read the indicators stored in a folder.

    Args:
        folder: The folder.

    Returns:
        The indicators. None if there are none, or, with a warning, if they cannot be read: a model runs without them.
    """
    path = Path(folder) / INDICATORS
    if not path.is_file():
        return None
    try:
        return read_indicators(path)
    except (PackedFormat, OSError) as error:
        warnings.warn(f"the stored indicators are ignored: {error}", stacklevel=2)
        return None
