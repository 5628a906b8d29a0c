"""Model libraries: how a model id becomes a network, and what the Hub needs to know of its library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from .layer import LayerGraph
from .registry import Registry


class Library(ABC):
    """A library that models come from, such as timm or transformers.

    A new library needs `name`, `knows` or `owns`, and `load`; everything else has a default. Neither importing the
    file of a library nor creating the object may import the library itself.

    Attributes:
        name: Name of the library: in packed files, as `library=` and as `--library`.
        builds_from_folder: Whether `load` builds the network from a saved folder. If not, whoever loads a packed model
            passes the network (`from_pretrained(…, module=net)`).
        folder_defaults: Keyword arguments of `load` for a folder that may come from others, unless the user gives them.
        preprocessing: Names of the files that say how an input is made, such as tokenizers. They are saved, published
            and fetched along with a model, so none of them may be able to run code.
        formats: Names of the formats in `hub_mpq.export` that the library loads by itself, as `float_code` says.
        pretrained_models: Whether its models are `transformers.PreTrainedModel`s. Once quantized they save, publish
            and train themselves through the transformers plug-in.
    """

    name: str
    builds_from_folder: ClassVar[bool] = True
    folder_defaults: ClassVar[Mapping[str, Any]] = {}
    preprocessing: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[tuple[str, ...]] = ()
    pretrained_models: ClassVar[bool] = False

    def knows(self, model_id: str) -> bool:
        """Whether an id is one of this library's by its form or by a list that is installed.

        Args:
            model_id: What the user typed; never a folder. Nothing is asked of the network.
        """
        return False

    def owns(self, config: Mapping[str, Any]) -> bool:
        """Whether the content of a config.json is this library's."""
        return False

    def near_names(self, model_id: str) -> list[str]:
        """Names of models that look like an id that nobody knows, best first."""
        return []

    @abstractmethod
    def load(self, model_id: str, *, pretrained: bool, meta: bool, **kwargs: Any) -> Any:
        """Build a model.

        Args:
            model_id: An id that this library knows, a Hub id, or a folder whose config.json it owns.
            pretrained: Load the weights too.
            meta: Build on the meta device: without weights, memory or, for a folder, network. Wins over `pretrained`.
            **kwargs: What else the user gave: `exclude` (patterns of layers to leave float), `revision`, `token` and
                the library's own arguments.

        Returns:
            A `hub_mpq.adapters.Source`.

        Raises:
            InvalidArgument: The id names nothing, or the model does not take an argument.
            HubMPQError: Files cannot be had.
        """

    def rebuild(self, folder: str, graph: LayerGraph, *, meta: bool, **kwargs: Any) -> Any:
        """Build the float network of a packed folder without its weights.

        The default is `load`, which runs the network; a library that can do without should.

        Args:
            folder: The folder.
            graph: The network's layers, as the packed file has them.
            meta: Build on the meta device.
            **kwargs: As for `load`.

        Returns:
            A `hub_mpq.adapters.Source`.

        Raises:
            InvalidArgument: The network does not take an argument.
            HubMPQError: It can't be built.
        """
        return self.load(folder, pretrained=False, meta=meta, **kwargs)

    def example_arguments(self, input_shape: tuple[int, ...]) -> Mapping[str, Any]:
        """Keyword arguments of `load` that give a model the example input that it was saved with.

        Args:
            input_shape: Shape of one sample of the model's first input, as a packed file tells it.
        """
        return {}

    def image_preprocess(self, source: Any) -> Mapping[str, Any]:
        """How images are prepared for a model.

        Args:
            source: The `hub_mpq.adapters.Source` of a model that takes images.

        Returns:
            Any of `mean`, `std`, `interpolation` and `crop_pct`; the rest has defaults.
        """
        return dict(source.preprocess)

    def resized(self, name: str, content: bytes, config: Mapping[str, Any], input_shape: tuple[int, ...]) -> bytes:
        """A preprocessing file as it is saved with a model that was given another input size than its folder says.

        Args:
            name: Name of the file, one of `preprocessing`.
            content: What the folder's own file holds.
            config: Content of the folder's config.json.
            input_shape: Shape of one sample of the model's first input.
        """
        return content

    def names_on_disk(self, model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of the float model under the names that the library reads from its files.

        Args:
            model: The network (an `nn.Module`).
            state: {name in the network: tensor}.
        """
        return dict(state)

    def hub_id(self, model_id: str) -> str | None:
        """Hub repository that a name of this library stands for; None if it is not known."""
        return None

    def card_data(self, config: Mapping[str, Any]) -> dict[str, str]:
        """What a config.json says for a card's front matter: `pipeline_tag` and `license`, where it says so."""
        return {}

    def float_code(self, repo_id: str, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Lines of Python that load the float copy of a repo with this library alone; () if it cannot.

        Args:
            repo_id: "owner/name" on the Hub.
            config: Content of the model's config.json.
        """
        return ()

    def plugin_code(self, repo_id: str, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Lines of Python that load the packed weights of a repo through transformers; () if it cannot.

        Args:
            repo_id: "owner/name" on the Hub.
            config: Content of the model's config.json.
        """
        return ()


L = TypeVar("L", bound=Library)

libraries: Registry[Library] = Registry("library", "hub_mpq.adapters")
"""All libraries: the package's and those registered. Models are looked for in this order."""


def register_library(library: L) -> L:
    """Make a library known by its name, and return it.

    Its models then work everywhere: in `HubMPQ.from_pretrained`, on the command line, in packed folders and on the Hub.

    Raises:
        InvalidArgument: The name is no word, or another library has it.

    Example:
        >>> class Toy(Library):
        ...     name = "toy"
        ...
        ...     def knows(self, model_id):
        ...         return model_id.startswith("toy:")
        ...
        ...     def load(self, model_id, *, pretrained, meta, **kwargs):
        ...         ...  # a hub_mpq.adapters.Source
        >>> toy = register_library(Toy())
    """
    libraries.register(getattr(library, "name", ""), library)
    return library
