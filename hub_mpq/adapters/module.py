"""Any network."""

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
    """Networks of the user's own code, which only that code can build."""

    name = "module"
    builds_from_folder = False

    def load(self, model_id: str, *, pretrained: bool, meta: bool, **kwargs: Any) -> Source:
        """Refuse: such a network goes in by `from_module`, or as `module=` with its packed folder.

        Raises:
            InvalidArgument: Always.
        """
        raise InvalidArgument(f"no library can build {model_id!r}; give the network itself to HubMPQ.from_module")


def from_module(
    net: nn.Module,
    example_input: Example,
    *,
    model_id: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    exclude: Iterable[str] = (),
    per_expert: bool = False,
) -> Source:
    """The Source of any network, traced on `example_input`: a tensor, a tuple of arguments or a dict of keywords,
    each tensor with the batch axis in front.

    The head is the last quantizable layer that runs; `graph.with_fixed` changes that. Raises InvalidArgument for
    an example without tensors and for `per_expert` without stacks of experts (else each expert is a layer of its own),
    HubMPQError when the network does not run on it.
    """
    if not isinstance(net, nn.Module):
        raise InvalidArgument(f"from_module takes an nn.Module, not {type(net).__name__}")
    if not tensors_of(example_input):
        raise InvalidArgument("example_input holds no tensor: give one batch as the network takes it")
    name = model_id or type(net).__name__
    example = (example_input,) if isinstance(example_input, Tensor) else example_input
    if per_expert or has_layers_to_expose(net):  # they become layers of a copy that shares the Parameters
        net = copied_structure(net)
        expose_layers(net)
        if per_expert and not split_experts(net):
            raise InvalidArgument(f"per_expert is for networks with stacks of experts, and {name!r} has none")
    graph = build_graph(net, example, model_id=name, exclude=exclude)
    return Source(net, name, None, ModuleLibrary.name, example, graph, dict(preprocess or {}))
