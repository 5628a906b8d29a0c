"""What every adapter answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core import LayerGraph
from ..errors import HubMPQError, is_connection_error, shown
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


def cannot_build(model_id: str, error: Exception, *, pretrained: bool) -> HubMPQError:
    """One sentence on why a model could not be built, from whatever its library raised."""
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
    return HubMPQError(
        f"the configuration of {model_id!r} can't be fetched; check the name and the network, or give a folder {said}"
    )
