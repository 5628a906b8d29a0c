"""What every adapter returns, and helpers that they share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core import LayerGraph
from ..errors import HubMPQError, InvalidArgument, is_connection_error, shown
from ..nn.types import device_of
from .forward import Example
from .restore_state import state_restored


@dataclass
class Source:
    """A model with its origin, its layers and an example input.

    Args:
        model: The float network, in evaluation mode.
        model_id: The id that was passed to `load`.
        revision: Commit of the Hub repository that its files come from, if any.
        library: Name of its `Library`.
        example: One sample on the model's device: a dict of keyword arguments or a tuple of positional ones.
        graph: Its layers.
        preprocess: timm's data config (`input_size`, `mean`, `std`, …), or the name of the tokenizer or processor.
        config: The library's own config.json to publish; {} for a module.

    Example:
        >>> from hub_mpq.adapters import load
        >>> source = load("resnet18", meta=True)
        >>> source.preprocess["input_size"]
        (3, 224, 224)
    """

    model: nn.Module
    model_id: str
    revision: str | None
    library: str
    example: Example
    graph: LayerGraph
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def noise(*shape: int, like: nn.Module) -> Tensor:
    """Standard normal values on the CPU with a fixed seed, in the dtype of the model's Parameters."""
    weight = next((p for p in like.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)


def likely_example(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """One sample for a network of which only the input shape is known; None if the network does not run on it.

    Args:
        model: The network.
        shape: Shape of the input, without the batch axis.
    """
    example = placed((noise(1, *shape, like=model),), model)
    try:
        with state_restored(model):
            model(*example)
    except Exception:  # a network may raise anything on an unexpected input
        return None
    return example


def placed(example: Example, model: nn.Module) -> Any:
    """The example on the device of the model."""
    device = device_of(model)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, example)


def commit_of(file: object) -> str | None:
    """Commit of the Hub repository that a file in the Hub cache comes from; None for any other file."""
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", str(file))
    return found and found[1]


def no_connection(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Exception | None:
    """The connection error of the Hub client if a repository's config is not cached and the Hub cannot be reached.

    The Hub is asked once, because the client's own download retries for half a minute. Returns None for any other
    problem, which the download itself reports or handles.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(repo_id, "config.json", revision=revision), str):
            get_hf_file_metadata(hf_hub_url(repo_id, "config.json", revision=revision), token=token)
    except Exception as error:
        kind = type(error)
        client = kind.__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
        return error if client and kind.__name__.startswith(("Connect", "Proxy")) else None
    return None


def find_config(
    repo_id: str, near: Callable[[], Sequence[str]], revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Download the config.json of a Hub repository.

    Args:
        repo_id: Hub id.
        near: Returns similar names, best first; called only if the repository is not found.
        revision: Branch, tag or commit.
        token: As for huggingface_hub.

    Raises:
        InvalidArgument: The repository does not exist and there are similar names, or the name is not valid on the Hub.
        HubMPQError: The file does not exist or cannot be downloaded.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        if (unreachable := no_connection(repo_id, revision, token)) is not None:
            raise unreachable
        return Path(hf_hub_download(repo_id, "config.json", revision=revision, token=token))
    except errors.HFValidationError as error:
        raise InvalidArgument(f"no such folder: {repo_id!r}, and it is not a valid Hub id") from error
    except Exception as error:
        names = near()
        if names and isinstance(error, errors.RepositoryNotFoundError):
            raise InvalidArgument(f"unknown model {repo_id!r}; did you mean {' or '.join(names)}?") from error
        raise cannot_build(repo_id, error, pretrained=False, near=names) from error


def near_repositories(model_id: str, known: Iterable[str] = ()) -> list[str]:
    """Up to three repositories with names similar to an id, with or without owner, from the Hub cache and `known`."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    names = sorted({*known, *(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)})
    whole = {name if "/" in model_id else name.rpartition("/")[2]: name for name in reversed(names)}
    return [whole[key] for key in difflib.get_close_matches(model_id, whole, n=3, cutoff=0.8)]


def cannot_build(model_id: str, error: Exception, *, pretrained: bool, near: Sequence[str] = ()) -> HubMPQError:
    """One sentence on why a model could not be built, from the error of its library, with similar names."""
    first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    said = f"[{type(error).__name__}: {shown(first, 160)}]"
    if not is_connection_error(error):
        return HubMPQError(f"cannot build {model_id!r} {said}")
    way = "use pretrained=False to build it without weights, or checkpoint_path= to load a local file"
    if Path(model_id).is_dir():
        return HubMPQError(f"cannot read the folder {model_id!r}; {way} {said}")
    if pretrained:
        return HubMPQError(
            f"cannot download the weights of {model_id!r}; check the name and the network ({way}) {said}"
        )
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    return HubMPQError(
        f"cannot download the configuration of {model_id!r}; check the name{meant} and the network, or pass a folder "
        f"{said}"
    )
