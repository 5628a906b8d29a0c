"""timm models by name, Hub id or folder."""

from __future__ import annotations

import contextlib
import difflib
import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import LayerGraph
from ..core.library import Library
from ..errors import HubMPQError, InvalidArgument, shown
from ..nn.expose import expose_layers
from ..versions import warn_if_untested
from .base import Source, cannot_build, commit_of, find_config, noise, placed
from .trace import build_graph


class TimmLibrary(Library):
    """timm's models: "resnet18", "resnet18.a1_in1k", "timm/…", "hf-hub:user/name" or a folder."""

    name = "timm"

    def knows(self, model_id: str) -> bool:
        """Whether an id has a timm prefix or a name in timm's registry, with or without a pretrained tag."""
        return model_id.startswith(("timm/", "hf-hub:", "hf_hub:", "local-dir:")) or _is_timm_name(model_id)

    def owns(self, config: Mapping[str, Any]) -> bool:
        return "architecture" in config

    def near_names(self, model_id: str) -> list[str]:
        """Up to three similar names in timm's registry; for an id with an owner, only if the owner is timm."""
        owner, _, name = model_id.rpartition("/")
        if owner.removeprefix("hf-hub:").removeprefix("hf_hub:") not in ("", "timm"):
            return []
        import timm

        return difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.6)

    def load(
        self,
        model_id: str,
        *,
        pretrained: bool = True,
        meta: bool = False,
        checkpoint_path: str | Path | None = None,
        revision: str | None = None,
        input_size: tuple[int, int, int] | None = None,
        exclude: Iterable[str] = (),
        graph: LayerGraph | None = None,
        **model_kwargs: Any,
    ) -> Source:
        """Build a timm model.

        Args:
            model_id: Name, Hub id or folder.
            pretrained: Load the weights too.
            meta: Build on the meta device, without weights and memory.
            checkpoint_path: File with the weights.
            revision: Branch, tag or commit of a Hub id.
            input_size: (channels, height, width); None for the model's own.
            exclude: Glob patterns of layers to leave float.
            graph: Its layers; None to find them by running the model once.
            **model_kwargs: Arguments of `timm.create_model`.

        Raises:
            InvalidArgument: The name is unknown (the error lists similar names), or an argument is not accepted.
            HubMPQError: The weights cannot be downloaded or read.
        """
        import timm
        from timm.data.config import resolve_model_data_config

        warn_if_untested("timm")
        if checkpoint_path is not None and not Path(checkpoint_path).is_file():
            raise InvalidArgument(f"checkpoint_path not found: {str(checkpoint_path)!r}")
        name = _timm_uri(model_id)
        if revision is not None:
            if not name.startswith(("hf-hub:", "hf_hub:")):
                raise InvalidArgument(
                    f"revision={revision!r} requires a Hub id such as hf-hub:user/name, got {model_id!r}"
                )
            name = f"{name}@{revision}"
        if repo := _repo_of(name):
            find_config(repo[0], lambda: self.near_names(model_id), repo[1])
        pretrained = pretrained and checkpoint_path is None and not meta
        path = None if checkpoint_path is None or meta else str(checkpoint_path)
        try:
            with torch.device("meta") if meta else contextlib.nullcontext():
                model = timm.create_model(name, pretrained=pretrained, checkpoint_path=path, **model_kwargs)
        except (TypeError, ValueError, AssertionError) as error:
            raise InvalidArgument(f"timm cannot build {model_id!r}: {shown(error)}") from error
        except Exception as error:
            raise cannot_build(model_id, error, pretrained=pretrained) from error
        model.eval()  # as transformers does
        expose_layers(model)
        data: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        if input_size is not None:
            data["input_size"] = tuple(input_size)
        elif "img_size" in model_kwargs:
            data["input_size"] = (data["input_size"][0], *_pair(model_kwargs["img_size"]))
        if "in_chans" in model_kwargs:
            data["input_size"] = (model_kwargs["in_chans"], *data["input_size"][1:])
        example = (noise(1, *data["input_size"], like=model),)
        on_device = placed(example, model)
        commit = _revision(model)
        graph = graph or build_graph(
            model,
            example if meta else on_device,
            model_id=model_id,
            revision=commit,
            library=self.name,
            head=_head(model),
            exclude=exclude,
        )
        config = _config(model, {**_saved_arguments(model_id), **model_kwargs}, data["input_size"])
        return Source(model, model_id, commit, self.name, on_device, graph, data, config)

    def rebuild(self, folder: str, graph: LayerGraph, *, meta: bool, **kwargs: Any) -> Source:
        return self.load(folder, pretrained=False, meta=meta, graph=graph, **kwargs)

    def example_arguments(self, input_shape: tuple[int, ...]) -> Mapping[str, Any]:
        return {"input_size": input_shape} if len(input_shape) == 3 and min(input_shape) > 0 else {}

    def hub_id(self, model_id: str) -> str | None:
        """The Hub id in timm's registry of pretrained weights."""
        import timm

        known = timm.get_pretrained_cfg(model_id.removeprefix("timm/"))
        hub_id = known.hf_hub_id if known is not None else None
        return str(hub_id) if hub_id and not str(hub_id).endswith("/") else None

    def card_data(self, config: Mapping[str, Any]) -> dict[str, str]:
        license = (config.get("pretrained_cfg") or {}).get("license")
        found = {"license": license} if isinstance(license, str) else {}
        return {"pipeline_tag": "image-classification", **found} if config.get("num_classes") else found

    def float_code(self, repo_id: str, config: Mapping[str, Any]) -> tuple[str, ...]:
        return ("import timm", f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True)')

    def plugin_code(self, repo_id: str, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Code that loads the model through transformers' TimmWrapper."""
        load = f'transformers.AutoModelForImageClassification.from_pretrained("{repo_id}")'
        return ("import hub_mpq, transformers", f"model = {load}  # a TimmWrapper")

    def input_code(self, repo_id: str, files: Collection[str], input_shape: tuple[int, ...]) -> tuple[str, ...]:
        if input_shape[:1] != (3,):
            return super().input_code(repo_id, files, input_shape)
        return (
            "import timm",
            "from PIL import Image",
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model.model))",
            'y = model(transform(Image.open("image.jpg").convert("RGB"))[None])',
        )


def _is_timm_name(name: str) -> bool:
    """Whether timm's registry has the name, with or without a pretrained tag ("resnet18.a1_in1k")."""
    if "/" in name or ":" in name:
        return False
    import timm

    return bool(timm.is_model(name.partition(".")[0]))


def _repo_of(name: str) -> tuple[str, str | None] | None:
    """(repository, revision) of a name that timm looks up on the Hub; None for any other."""
    if not name.startswith(("hf-hub:", "hf_hub:")):
        return None
    repo, _, revision = name.partition(":")[2].partition("@")
    return repo, revision or None


def _timm_uri(model_id: str) -> str:
    """The name for timm.create_model; raises InvalidArgument if timm does not know it."""
    if Path(model_id).is_dir():
        return f"local-dir:{model_id}"
    if model_id.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return model_id
    name = model_id.removeprefix("timm/")
    if _is_timm_name(name):
        return name
    if "/" in model_id:
        return f"hf-hub:{model_id}"
    near = TimmLibrary().near_names(name)
    raise InvalidArgument(f"timm has no model {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def _head(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's layers (two for distilled models); () for a model without a classifier."""
    try:
        found = model.get_classifier()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return ()
    heads = {id(m) for m in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(m, nn.Module)}
    return tuple(name for name, module in model.named_modules() if id(module) in heads)


def _revision(model: nn.Module) -> str | None:
    """Commit of the Hub repository that the model's files come from, if they are in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repo = (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id")
    if not isinstance(repo, str) or not repo:
        return None
    repo, _, revision = repo.partition("@")
    with contextlib.suppress(HFValidationError):  # a config.json may contain anything
        for file in ("model.safetensors", "config.json"):
            if found := commit_of(try_to_load_from_cache(repo, file, revision=revision or None)):
                return found
    return None


def _saved_arguments(model_id: str) -> dict[str, Any]:
    """Model arguments in a folder's config.json, which timm does not expose before 1.0.31."""
    file = Path(model_id) / "config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("model_args") if file.is_file() else None
    return dict(found or {})


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _config(model: nn.Module, model_kwargs: dict[str, Any], input_size: Sequence[int]) -> dict[str, Any]:
    """config.json as timm writes it, with the model's actual input size, which timm's loaders and data config and
    transformers' image processor read there. num_classes is not in model_args, because transformers' TimmWrapper fails
    on it."""
    from timm.models import _hub

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        try:
            _hub.save_config_for_hf(model, file, model_args=dict(model_kwargs))
        except (TypeError, ValueError, AttributeError) as error:
            raise HubMPQError(f"timm cannot write a config.json for this model: {error}") from error
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    own, arguments = config["pretrained_cfg"], config.get("model_args", {})
    built = model.pretrained_cfg["input_size"][1:]
    if own.get("fixed_input_size") and _pair(arguments.get("img_size", built)) != _pair(input_size[1:]):
        # it takes other sizes than its default (dynamic_img_size, XCiT); img_size keeps the one it was built for
        config["model_args"] = arguments = {"img_size": list(built), **arguments}
        own["fixed_input_size"] = False
    other = _pair(own["input_size"][1:]) != _pair(input_size[1:])
    for key in ("pool_size", "test_input_size", "test_pool_size"):
        if other or own.get(key) is None:
            own.pop(key, None)
    own["input_size"] = list(input_size)
    arguments.pop("num_classes", None)
    if not config.get("model_args", True):
        del config["model_args"]
    return config
