"""Image folders, and the labels of their class folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import HubMPQError, InvalidArgument

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


def read_class_map(path: str | Path) -> dict[str, int]:
    """Read a class map: a text file with one class folder per line, in the order of the labels.

    Args:
        path: The file, in UTF-8. Empty lines are ignored.

    Returns:
        `{class folder: label}`, labels counted from 0.

    Raises:
        HubMPQError: The file cannot be read.
        InvalidArgument: The file is empty or names a folder twice.

    Example:
        >>> from pathlib import Path
        >>> from hub_mpq.data import read_class_map
        >>> _ = Path("classes.txt").write_text("cat\\ndog\\n")
        >>> read_class_map("classes.txt")
        {'cat': 0, 'dog': 1}
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise HubMPQError(f"cannot read class map {path}: {error}") from error
    if not names or len(set(names)) != len(names):
        raise InvalidArgument(f"class map {path} must name each class folder exactly once, one per line")
    return {name: label for label, name in enumerate(names)}


def list_images(folder: str | Path, class_map: Mapping[str, int] | None = None) -> list[tuple[Path, int | None]]:
    """List the images of a folder, with their labels if it contains class folders.

    Args:
        folder: A folder of class folders, or a folder of images without labels.
        class_map: `{class folder: label}`; by default, labels follow the natural order of the folder names, as in timm.

    Returns:
        `(path, label)` for each image; the label is None for a folder of images.

    Raises:
        InvalidArgument: The folder does not exist, contains no images, mixes images with class folders, contains
            splits such as `train` and `val`, or has a class folder that is not in the class map.

    Example:
        >>> from pathlib import Path
        >>> from hub_mpq.data import list_images
        >>> for name in ("cat", "dog"):
        ...     Path("pets", name).mkdir(parents=True)
        ...     Path("pets", name, "1.png").touch()
        >>> [(path.as_posix(), label) for path, label in list_images("pets")]
        [('pets/cat/1.png', 0), ('pets/dog/1.png', 1)]
    """
    root = Path(folder)
    if not root.is_dir():
        if root.exists():
            raise InvalidArgument(f"{root} is not a folder of images, a .tar file, or hfds/… or wds/… data")
        raise InvalidArgument(f"data folder not found: {root}")
    loose = [(path, None) for path in sorted(root.iterdir()) if path.suffix.lower() in IMAGES and path.is_file()]
    classes = {path.name: _walk(path) for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    filled = {name: files for name, files in classes.items() if files}
    if loose and filled:
        raise InvalidArgument(f"{root} contains both images and class folders, so labels are ambiguous; keep only one")
    if not loose and not filled:
        raise InvalidArgument(f"{root} contains no images")
    if loose:
        return list(loose)
    if {"train", "val", "validation", "test"} >= set(classes):
        raise InvalidArgument(
            f"{root} contains {' and '.join(sorted(classes))}; choose one of them, for example {root}/train"
        )
    if class_map is None:
        from timm.utils.misc import natural_key

        class_map = {name: label for label, name in enumerate(sorted(classes, key=natural_key))}
    if unknown := sorted(set(filled) - set(class_map)):
        raise InvalidArgument(
            f"{root}: class folder {unknown[0]!r} is not in the class map ({len(unknown)} missing in total)"
        )
    return [(path, class_map[name]) for name in sorted(filled, key=class_map.__getitem__) for path in filled[name]]


def _walk(folder: Path) -> list[Path]:
    found = (Path(root) / file for root, _, files in os.walk(folder, followlinks=True) for file in files)
    return sorted(path for path in found if path.suffix.lower() in IMAGES)
