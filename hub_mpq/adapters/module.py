"""Networks from the user's own code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.library import Library
from ..errors import InvalidArgument
from ..nn.expose import expose_layers, has_layers_to_expose
from ..nn.split_experts import split_experts
from .base import Source
from .forward import Example, tensors_of
from .restore_state import copied_structure
from .trace import build_graph


class ModuleLibrary(Library):
    """Networks from the user's own code, which only that code can build."""

    name = "module"
    builds_from_folder = False

    def load(self, model_id: str, *, pretrained: bool, meta: bool, **kwargs: Any) -> Source:
        """Always fail: pass the network itself to `from_module`, or as `module=` together with its packed folder.

        Raises:
            InvalidArgument: Always.
        """
        raise InvalidArgument(f"no library can build {model_id!r}; pass the network itself to HubMPQ.from_module")


def from_module(
    net: nn.Module,
    example_input: Example,
    *,
    model_id: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    exclude: Iterable[str] = (),
    per_expert: bool = False,
) -> Source:
    """Describe the layers of any network by tracing it on an example input.

    The head is the last quantizable layer that runs; `graph.with_fixed` changes that.

    Args:
        net: The network. It is not changed; layers that have to be rewritten are replaced in a copy that shares its
            Parameters.
        example_input: A tensor, a tuple of arguments or a dict of keyword arguments; every tensor starts with a batch
            axis.
        model_id: Name of the network; None for the name of its class.
        preprocess: Settings of its preprocessing, stored with the model; None for none.
        exclude: Glob patterns of layers to leave float.
        per_expert: Treat each expert of a stack as a separate layer.

    Returns:
        The network with its layers.

    Raises:
        InvalidArgument: `net` is not an nn.Module, the example contains no tensor, or `per_expert` is set for a network
            without stacked experts.
        HubMPQError: The network does not run on the example.

    Example:
        >>> import torch
        >>> from hub_mpq.adapters import from_module
        >>> with torch.random.fork_rng():
        ...     net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> from_module(net, torch.zeros(1, 8)).graph.names
        ('0', '2')
    """
    if not isinstance(net, nn.Module):
        raise InvalidArgument(f"from_module expects an nn.Module, got {type(net).__name__}")
    if not tensors_of(example_input):
        raise InvalidArgument("example_input contains no tensor; pass one batch of the network's inputs")
    name = model_id or type(net).__name__
    example = (example_input,) if isinstance(example_input, Tensor) else example_input
    if per_expert or has_layers_to_expose(net):  # in a copy that shares the Parameters
        net = copied_structure(net)
        expose_layers(net)
        if per_expert and not split_experts(net):
            raise InvalidArgument(f"per_expert requires a network with stacked experts, and {name!r} has none")
    graph = build_graph(net, example, model_id=name, exclude=exclude)
    return Source(net, name, None, ModuleLibrary.name, example, graph, dict(preprocess or {}))
