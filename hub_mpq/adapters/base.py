"""What every adapter answers."""

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
    """A model, where it comes from, and what runs through it.

    Attributes:
        model: The float network, in evaluation mode.
        model_id: The id it was asked for by.
        revision: Commit of the Hub repository that its files were taken from, if any.
        library: Name of its `hub_mpq.core.library.Library`.
        example: One sample on the model's device: keyword arguments or a tuple of positional ones.
        graph: Its layers.
        preprocess: timm's data config (input_size, mean, std, …), or the name of the tokenizer or processor.
        config: The library's own config.json, as it is to be published; {} for a module.
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
    """Standard normal values on the CPU, the same each time, in the dtype of the model's Parameters."""
    weight = next((p for p in like.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)


def likely_example(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """One sample for a network of which only the shape of its input is known; None where it takes something else.

    Args:
        model: The network.
        shape: Of its input, without the batch axis.
    """
    example = placed((noise(1, *shape, like=model),), model)
    try:
        with state_restored(model):
            model(*example)
    except Exception:  # a network may raise anything on what it does not expect
        return None
    return example


def placed(example: Example, model: nn.Module) -> Any:
    """The example on the device of the model."""
    device = device_of(model)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, example)


def commit_of(file: object) -> str | None:
    """Commit of the Hub repository that a file of the Hub client's cache was taken from; None for any other file."""
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", str(file))
    return found and found[1]


def no_connection(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Exception | None:
    """What the Hub's client raises where a repository's config is not in the cache and the Hub can't be reached.

    The Hub is asked once: the client's own download tries for half a minute. Whatever else is wrong, None: the download
    says so, or gets over it.
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
    """The config.json of a Hub repository.

    Args:
        repo_id: As the Hub takes it.
        near: Names that look like it, best first; asked for only where there is no such repository.
        revision: Branch, tag or commit.
        token: As for huggingface_hub.

    Raises:
        InvalidArgument: The Hub has none, and there are near names, or none can have that name.
        HubMPQError: There is none, or it can't be had.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        if (unreachable := no_connection(repo_id, revision, token)) is not None:
            raise unreachable
        return Path(hf_hub_download(repo_id, "config.json", revision=revision, token=token))
    except errors.HFValidationError as error:
        raise InvalidArgument(f"no such folder: {repo_id!r}, and no Hub repository can have that name") from error
    except Exception as error:
        names = near()
        if names and isinstance(error, errors.RepositoryNotFoundError):
            raise InvalidArgument(f"unknown model {repo_id!r}; did you mean {' or '.join(names)}?") from error
        raise cannot_build(repo_id, error, pretrained=False, near=names) from error


def near_repositories(model_id: str, known: Iterable[str] = ()) -> list[str]:
    """Up to three repositories that look like an id, with or without their owner: of the Hub client's cache, and
    `known` ones."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    names = sorted({*known, *(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)})
    whole = {name if "/" in model_id else name.rpartition("/")[2]: name for name in reversed(names)}
    return [whole[key] for key in difflib.get_close_matches(model_id, whole, n=3, cutoff=0.8)]


def cannot_build(model_id: str, error: Exception, *, pretrained: bool, near: Sequence[str] = ()) -> HubMPQError:
    """One sentence on why a model could not be built, from whatever its library raised, with near names."""
    first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    said = f"[{type(error).__name__}: {shown(first, 160)}]"
    if not is_connection_error(error):
        return HubMPQError(f"{model_id!r} can't be built {said}")
    way = "pretrained=False builds it without weights, checkpoint_path= takes a file that is here"
    if Path(model_id).is_dir():
        return HubMPQError(f"the folder {model_id!r} can't be read; {way} {said}")
    if pretrained:
        return HubMPQError(
            f"the weights of {model_id!r} can't be fetched; check the name and the network ({way}) {said}"
        )
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    return HubMPQError(
        f"the configuration of {model_id!r} can't be fetched; check the name{meant} and the network, or give a folder "
        f"{said}"
    )
