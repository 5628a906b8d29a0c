"""Folders of images, and the labels of their class folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import HubMPQError, InvalidArgument

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


def read_class_map(path: str | Path) -> dict[str, int]:
    """{class folder: label} of a text file with one folder name a line, in the order of the labels."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise HubMPQError(f"class map {path} cannot be read: {error}") from error
    if not names or len(set(names)) != len(names):
        raise InvalidArgument(f"class map {path} must name each class folder once, one a line")
    return {name: label for label, name in enumerate(names)}


def list_images(folder: str | Path, class_map: Mapping[str, int] | None = None) -> list[tuple[Path, int | None]]:
    """Files of a folder of class folders with labels, or of a folder of images without.

    Labels are the class map's, else the position of the class folder in natural order (timm's). Raises
    InvalidArgument when there are no images, when images and class folders are mixed, or for an unknown class.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InvalidArgument(f"no such data folder: {root}")
    loose = [(path, None) for path in sorted(root.iterdir()) if path.suffix.lower() in IMAGES and path.is_file()]
    classes = {path.name: _walk(path) for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    filled = {name: files for name, files in classes.items() if files}
    if loose and filled:
        raise InvalidArgument(f"{root} holds images and class folders; labels are not clear: keep one of the two")
    if not loose and not filled:
        raise InvalidArgument(f"{root} holds no images")
    if loose:
        return list(loose)
    if {"train", "val", "validation", "test"} >= set(classes):
        raise InvalidArgument(
            f"{root} holds {' and '.join(sorted(classes))}: name one of them, for example {root}/train"
        )
    if class_map is None:
        from timm.utils.misc import natural_key

        class_map = {name: label for label, name in enumerate(sorted(classes, key=natural_key))}
    if unknown := sorted(set(filled) - set(class_map)):
        raise InvalidArgument(f"{root}: class folder {unknown[0]!r} is not in the class map ({len(unknown)} such)")
    return [(path, class_map[name]) for name in sorted(filled, key=class_map.__getitem__) for path in filled[name]]


def _walk(folder: Path) -> list[Path]:
    found = (Path(root) / file for root, _, files in os.walk(folder, followlinks=True) for file in files)
    return sorted(path for path in found if path.suffix.lower() in IMAGES)
