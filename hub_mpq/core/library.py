"""Model libraries: how a model id becomes a network, and what the Hub needs to know about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

from .layer import LayerGraph
from .registry import Registry


class Library(ABC):
    """A library that models come from, such as timm or transformers.

    A new library needs `name`, `knows` or `owns`, and `load`; everything else has a default. Neither importing the
    module that defines a `Library` nor creating the object may import the library itself.

    Attributes:
        name: Name of the library, used in packed files, by `library=` and by `--library`.
        builds_from_folder: Whether `load` can build the network from a saved folder. If not, the caller who loads a
            packed model must pass the network (`from_pretrained(…, module=net)`).
        folder_defaults: Default keyword arguments of `load` for a folder that may come from an untrusted source.
        preprocessing: Names of the preprocessing files, such as tokenizers. They are saved, published and downloaded
            with a model, so none of them may be able to run code.
        formats: Names of the formats in `hub_mpq.export` that the library loads natively, see `float_code`.
        pretrained_models: Whether its models are subclasses of `transformers.PreTrainedModel`. Once quantized, they are
            saved, published and trained through the transformers plug-in.

    Example:
        >>> from hub_mpq.core import libraries
        >>> libraries.get("timm").knows("resnet18"), libraries.get("transformers").knows("resnet18")
        (True, False)
    """

    name: str
    builds_from_folder: ClassVar[bool] = True
    folder_defaults: ClassVar[Mapping[str, Any]] = {}
    preprocessing: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[tuple[str, ...]] = ()
    pretrained_models: ClassVar[bool] = False

    def knows(self, model_id: str) -> bool:
        """Return whether an id belongs to this library, by its form or by an installed list of models.

        It must not use the network.

        Args:
            model_id: The id as the user typed it; never a folder.

        Returns:
            True if this library should load the id.
        """
        return False

    def owns(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config.json belongs to this library.

        Args:
            config: Content of the config.json.

        Returns:
            True if this library should load the model.
        """
        return False

    def near_names(self, model_id: str) -> list[str]:
        """Suggest model names similar to an unknown id.

        Args:
            model_id: The unknown id.

        Returns:
            Names of models, the most similar first.
        """
        return []

    @abstractmethod
    def load(self, model_id: str, *, pretrained: bool, meta: bool, **kwargs: Any) -> Any:
        """Build a model.

        Args:
            model_id: An id that this library knows, a Hub id, or a folder whose config.json it owns.
            pretrained: Load the weights too.
            meta: Build on the meta device: without weights or memory, and for a folder without the network. Overrides
                `pretrained`.
            **kwargs: Further arguments of the user: `exclude` (patterns of layers to keep float), `revision`, `token`
                and the library's own arguments.

        Returns:
            A `hub_mpq.adapters.Source`.

        Raises:
            InvalidArgument: The id is unknown, or the model does not accept an argument.
            HubMPQError: The files cannot be read or downloaded.
        """

    def rebuild(self, folder: str, graph: LayerGraph, *, meta: bool, **kwargs: Any) -> Any:
        """Build the float network of a packed folder without its weights.

        The default calls `load`, which runs the network; override this if the library can avoid that.

        Args:
            folder: The packed folder.
            graph: The network's layers, as stored in the packed file.
            meta: Build on the meta device.
            **kwargs: See `load`.

        Returns:
            A `hub_mpq.adapters.Source`.

        Raises:
            InvalidArgument: The network does not accept an argument.
            HubMPQError: The network cannot be built.
        """
        return self.load(folder, pretrained=False, meta=meta, **kwargs)

    def example_arguments(self, input_shape: tuple[int, ...]) -> Mapping[str, Any]:
        """Return the keyword arguments of `load` that recreate the example input a model was saved with.

        Args:
            input_shape: Shape of one sample of the model's first input, as stored in the packed file.

        Returns:
            {argument: value}.
        """
        return {}

    def image_preprocess(self, source: Any) -> Mapping[str, Any]:
        """Return how images are prepared for a model.

        Args:
            source: The `hub_mpq.adapters.Source` of a model that takes images.

        Returns:
            Any of `mean`, `std`, `interpolation` and `crop_pct`; defaults apply to the rest.
        """
        return dict(source.preprocess)

    def resized(self, name: str, content: bytes, config: Mapping[str, Any], input_shape: tuple[int, ...]) -> bytes:
        """Adapt a preprocessing file to a model whose input size differs from that of its original folder.

        Args:
            name: Name of the file, one of `preprocessing`.
            content: Content of the original file.
            config: Content of the original folder's config.json.
            input_shape: Shape of one sample of the model's first input.

        Returns:
            The content to save.
        """
        return content

    def names_on_disk(self, model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        """Rename a state dict of the float model to the names that the library reads from its files.

        Args:
            model: The network (an `nn.Module`).
            state: {name in the network: tensor}.

        Returns:
            {name in the file: tensor}.
        """
        return dict(state)

    def hub_id(self, model_id: str) -> str | None:
        """Return the Hub repository behind a model name.

        Args:
            model_id: A model name of this library.

        Returns:
            The repository, "owner/name"; None if it is not known.
        """
        return None

    def card_data(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return fields of the model card's front matter that a config.json determines.

        Args:
            config: Content of the model's config.json.

        Returns:
            `pipeline_tag` and `license`, as far as they are known.
        """
        return {}

    def float_code(self, repo_id: str, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return Python code that loads the float copy of a repo with this library alone.

        Args:
            repo_id: "owner/name" on the Hub.
            config: Content of the model's config.json.

        Returns:
            The lines of code; () if the library cannot load it.
        """
        return ()

    def plugin_code(self, repo_id: str, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return Python code that loads the packed weights of a repo through transformers.

        Args:
            repo_id: "owner/name" on the Hub.
            config: Content of the model's config.json.

        Returns:
            The lines of code; () if transformers cannot load it.
        """
        return ()

    def input_code(self, repo_id: str, files: Collection[str], input_shape: tuple[int, ...]) -> tuple[str, ...]:
        """Return Python code that prepares an input and computes the output of `model`, a `HubMPQ`.

        Args:
            repo_id: "owner/name" on the Hub.
            files: Names of the files in the repo.
            input_shape: Input shape of the model, without batch.

        Returns:
            The lines of code.
        """
        return ("y = model(x)",)


L = TypeVar("L", bound=Library)

libraries: Registry[Library] = Registry("library", "hub_mpq.adapters")
"""All libraries, built-in and registered, in the order in which they are asked for a model id."""


def register_library(library: L) -> L:
    """Register a model library.

    Its models then work everywhere: in `HubMPQ.from_pretrained`, on the command line, in packed folders and on the Hub.

    Args:
        library: The library; its name must be new.

    Returns:
        The same library.

    Raises:
        InvalidArgument: The name is not valid, or another library has it.

    Example:
        >>> from hub_mpq import Library, register_library
        >>> class Toy(Library):
        ...     name = "toy"
        ...
        ...     def knows(self, model_id):
        ...         return model_id.startswith("toy:")
        ...
        ...     def load(self, model_id, *, pretrained, meta, **kwargs): ...  # return a hub_mpq.adapters.Source
        >>> toy = register_library(Toy())
    """
    libraries.register(getattr(library, "name", ""), library)
    return library
