"""Sources of images: a folder, or one of timm's readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ..errors import HubMPQError, InvalidArgument
from .folders import list_images

_STREAMS = ("wds/", "hfids/", "tfds/")


class Folder(Sequence[Any]):
    """Files of a folder."""

    def __init__(self, files: Sequence[tuple[Path, int | None]]) -> None:
        self.files = files
        self.labels = {label for _, label in files if label is not None}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        return self.files[index]

    def name(self, index: int) -> str:
        """Name of the image in error messages."""
        return str(self.files[index][0])


class Reader(Sequence[Any]):
    """Images of one of timm's readers."""

    def __init__(self, reader: Any, name: str) -> None:
        self.reader, self._name = reader, name
        known = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        self.labels = {int(label) for label in known.values()}

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Any) -> Any:
        file, label = self.reader[index]
        return file, int(label)

    def name(self, index: int) -> str:
        """Name of the image in error messages."""
        return f"{self._name}: {self.reader.filename(index)}"


def is_stream(data: str | Path) -> bool:
    """Whether the data are streamed from shards."""
    return str(data).startswith(_STREAMS)


def open_source(data: str | Path, class_map: Mapping[str, int] | None) -> Folder | Reader:
    """Open a folder, a .tar file or "hfds/NAME[:SPLIT]"; raises HubMPQError if that fails."""
    text = str(data)
    if text.startswith("hfds/"):
        name, split = _split(text, "train")
        return Reader(_read(text, name, None, split, class_map), text)
    if text.endswith(".tar") and Path(text).is_file():
        # no cached index, which would be a pickle next to the file; no open handles, whose position workers would share
        plain = {"cache_tarinfo": False, "cache_tarfiles": False}
        return Reader(_read(text, "", text, "train", class_map, **plain), text)
    return Folder(list_images(data, class_map))


def _split(text: str, split: str) -> tuple[str, str]:
    """Split "hfds/NAME:SPLIT" into (hfds/NAME, SPLIT)."""
    name, colon, given = text.rpartition(":")
    return (name, given) if colon and "/" in name else (text, split)


def _read(text: str, name: str, root: str | None, split: str, class_map: Any, **more: Any) -> Any:
    from timm.data.readers import create_reader

    try:
        return create_reader(name, root, split, class_map=class_map, **more)
    except ImportError as error:
        raise HubMPQError(f"{text} requires an extra package; pip install 'hub-mpq[data]' ({error})") from error
    except Exception as error:  # each reader raises its own errors
        raise InvalidArgument(f"cannot read {text} ({type(error).__name__}: {error})") from error


def stream(
    text: str,
    config: Mapping[str, Any],
    *,
    train: bool,
    class_map: Mapping[str, int] | None,
    batch_size: int,
    workers: int,
    seed: int,
) -> DataLoader[Any]:
    """Create timm's data set and loader of shards, which give each process and worker its own part.

    The order is timm's; a resumed run reads the same data again. The reader skips unreadable images. There is at least
    one worker, because timm before 1.0.31 treats a stream without workers as empty.
    """
    from timm.data import create_dataset, create_loader

    name, split = _split(text, "train" if train else "validation")
    if name.startswith("tfds/") and find_spec("tensorflow_datasets") is None:
        raise HubMPQError(f"{text} requires an extra package; pip install tensorflow-datasets")
    root = name.partition("/")[2] if name.startswith("wds/") else None
    if root is not None and not (root and Path(root).is_dir()):
        raise InvalidArgument(f"cannot read {text}: folder {root!r} not found")
    try:
        data = create_dataset(
            name,
            root=root,
            split=split,
            is_training=train,
            batch_size=batch_size,
            seed=seed,
            class_map=class_map,  # type: ignore[arg-type]
            input_img_mode="L" if config["input_size"][0] == 1 else "RGB",
        )
    except ImportError as error:
        raise HubMPQError(f"{text} requires an extra package; pip install 'hub-mpq[data]' ({error})") from error
    except Exception as error:
        raise InvalidArgument(f"cannot read {text} ({type(error).__name__}: {error})") from error
    plain: dict[str, Any] = {"use_prefetcher": False, "color_jitter": 0.0}  # as Images augments
    loader = create_loader(
        data, batch_size=batch_size, is_training=train, num_workers=max(workers, 1), **plain, **config
    )
    loader.sharded = True  # by processes and workers
    return loader  # type: ignore[no-any-return]
