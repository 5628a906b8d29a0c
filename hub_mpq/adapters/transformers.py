"""transformers models by Hub id or folder."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..core import LayerGraph
from ..core.library import Library
from ..errors import HubMPQError, InvalidArgument
from ..nn.expose import expose_layers
from ..nn.split_experts import split_experts
from ..nn.types import layer_kind
from ..versions import warn_if_untested
from .base import Source, cannot_build, commit_of, near_repositories, placed
from .example_inputs import example_for
from .trace import build_graph

_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
}
"""{suffix of a class name: pipeline tag of the Hub}"""


class TransformersLibrary(Library):
    """transformers' models, by Hub id or folder."""

    name = "transformers"
    folder_defaults: ClassVar[Mapping[str, Any]] = {"trust_remote_code": False}
    """Without it, transformers asks whether to run the code of an unknown model_type."""
    preprocessing = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
        "generation_config.json",
    )
    """All of these are text or protocol buffers."""
    formats = ("compressed-tensors",)
    pretrained_models = True

    def owns(self, config: Mapping[str, Any]) -> bool:
        return "model_type" in config

    def near_names(self, model_id: str) -> list[str]:
        """Up to three similar repositories, from the Hub cache and from the configs of transformers."""
        return near_repositories(model_id, _checkpoints())

    def load(
        self,
        model_id: str,
        *,
        pretrained: bool = True,
        meta: bool = False,
        checkpoint_path: str | Path | None = None,
        auto_class: str | None = None,
        sequence_length: int = 128,
        exclude: Iterable[str] = (),
        per_expert: bool | Collection[str] = False,
        graph: LayerGraph | None = None,
        **kwargs: Any,
    ) -> Source:
        """Build a transformers model, by default of the first class in its config's `architectures`.

        Args:
            model_id: Hub id or folder.
            pretrained: Load the weights too.
            meta: Build on the meta device, without weights and memory.
            checkpoint_path: Safetensors file with the state dict.
            auto_class: Another class of transformers, for example "AutoModelForSequenceClassification".
            sequence_length: Number of tokens in the example, limited to what the model takes.
            exclude: Glob patterns of layers to leave float.
            per_expert: Treat each expert of a stack as a separate layer: True for all stacks, or names of stacks.
            graph: The model's layers; None to find them by running the model once.
            **kwargs: Values of the config (num_labels=3) and arguments of `from_pretrained` (revision, dtype).

        Raises:
            InvalidArgument: The class or an argument is unknown, or `per_expert` is set for a model without experts.
            HubMPQError: The config or the weights cannot be downloaded or read.
        """
        import transformers

        warn_if_untested("transformers")
        if checkpoint_path is not None and not Path(checkpoint_path).is_file():
            raise InvalidArgument(f"checkpoint_path not found: {str(checkpoint_path)!r}")
        pretrained = pretrained and checkpoint_path is None and not meta
        try:
            config, unused = transformers.AutoConfig.from_pretrained(model_id, return_unused_kwargs=True, **kwargs)
        except Exception as error:
            raise cannot_build(model_id, error, pretrained=False) from error
        cls = model_class(config, auto_class)
        quantized = getattr(config, "quantization_config", None)
        if pretrained and quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
            raise HubMPQError(
                f"{model_id!r} is already quantized ({getattr(method, 'value', method)}): load it with transformers, "
                "or quantize its float model instead"
            )
        try:
            if pretrained:
                model = cls.from_pretrained(model_id, config=config, **unused)
            else:
                model = _skeleton(cls, config, unused, meta=meta)
                if checkpoint_path is not None and not meta:
                    _fill(model, Path(checkpoint_path))
        except HubMPQError:
            raise
        except Exception as error:
            raise cannot_build(model_id, error, pretrained=pretrained) from error
        expose_layers(model)
        if per_expert is not False and not split_experts(model, None if per_expert is True else per_expert):
            raise InvalidArgument(f"per_expert requires a model with stacked experts, and {model_id!r} has none")
        example = example_for(model, sequence_length)
        on_device = placed(example, model)
        revision = _commit(model_id, kwargs.get("revision"))
        graph = graph or build_graph(
            model,
            example if meta else on_device,
            model_id=model_id,
            revision=revision,
            library=self.name,
            head=head_of(model),
            exclude=exclude,
        )
        config.architectures = [type(model).__name__]
        preprocess = preprocess_of(model_id, example)
        return Source(model, model_id, revision, self.name, on_device, graph, preprocess, config.to_dict())

    def rebuild(self, folder: str, graph: LayerGraph, *, meta: bool, **kwargs: Any) -> Source:
        return self.load(folder, pretrained=False, meta=meta, graph=graph, **kwargs)

    def example_arguments(self, input_shape: tuple[int, ...]) -> Mapping[str, Any]:
        return {"sequence_length": input_shape[0]} if len(input_shape) == 1 and input_shape[0] > 0 else {}

    def image_preprocess(self, source: Source) -> Mapping[str, Any]:
        """Mean, std and interpolation of the image processor; {} with a warning if it is not found."""
        if len(source.graph.input_shape) != 3:
            return source.preprocess
        import transformers

        name = source.preprocess.get("processor", "")
        try:
            processor: Any = transformers.AutoImageProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]
        except Exception as error:
            warnings.warn(
                f"image processor of {name!r} not found ({type(error).__name__}); using mean 0.5 and std 0.5",
                stacklevel=2,
            )
            return {}
        by_number = {0: "nearest", 2: "bilinear", 3: "bicubic"}
        resample = by_number.get(int(getattr(processor, "resample", 2) or 2), "bilinear")
        return {"mean": processor.image_mean, "std": processor.image_std, "interpolation": resample}

    def resized(self, name: str, content: bytes, config: Mapping[str, Any], input_shape: tuple[int, ...]) -> bytes:
        """Adapt the resize and crop sizes of an image processor if `image_size` was changed."""
        before = config.get("image_size")
        if name != "preprocessor_config.json" or len(input_shape) != 3 or not before:
            return content
        new, old = input_shape[1:], (before, before) if isinstance(before, int) else tuple(before)[-2:]
        if new == old:
            return content
        processor = json.loads(content)
        for key in ("size", "crop_size"):
            if isinstance(size := processor.get(key), dict):
                whole = {"height": new[0], "width": new[1], "shortest_edge": min(new)}
                there = {"height": old[0], "width": old[1], "shortest_edge": min(old)}
                processor[key] = {k: round(v * whole[k] / there[k]) if k in whole else v for k, v in size.items()}
            elif isinstance(size, int):
                processor[key] = round(size * min(new) / min(old))
        return (json.dumps(processor, indent=2, sort_keys=True) + "\n").encode()

    def names_on_disk(self, model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        """Names in checkpoints, which can differ from module names since transformers 5 (ViT, Mixtral)."""
        from transformers.core_model_loading import revert_weight_conversion

        warn_if_untested("transformers")
        return dict(revert_weight_conversion(model, dict(state)))

    def card_data(self, config: Mapping[str, Any]) -> dict[str, str]:
        architecture = _architecture(config) or ""
        tag = next((tag for end, tag in _TASKS.items() if architecture.endswith(end)), None)
        return {"pipeline_tag": tag} if tag else {}

    def float_code(self, repo_id: str, config: Mapping[str, Any]) -> tuple[str, ...]:
        import transformers

        cls = _architecture(config) or "AutoModel"
        auto = re.sub(r"^.*?(?=For[A-Z])", "AutoModel", cls)  # BertForMaskedLM → AutoModelForMaskedLM
        cls = auto if hasattr(transformers, auto) else cls
        return ("import transformers", f'model = transformers.{cls}.from_pretrained("{repo_id}")')

    def plugin_code(self, repo_id: str, config: Mapping[str, Any]) -> tuple[str, ...]:
        _, load = self.float_code(repo_id, config)
        return ("import hub_mpq, transformers", load)

    def input_code(self, repo_id: str, files: Collection[str], input_shape: tuple[int, ...]) -> tuple[str, ...]:
        if "tokenizer_config.json" not in files or "preprocessor_config.json" in files:
            return super().input_code(repo_id, files, input_shape)
        return (
            "from transformers import AutoTokenizer",
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
            'y = model(**tokenizer("A sentence.", return_tensors="pt"))',
        )


def _checkpoints() -> list[str]:
    """Hub ids in the source of transformers' configs, one per model type."""
    import transformers

    files = Path(transformers.__file__).parent.glob("models/*/configuration_*.py")
    found = (re.search(r'checkpoint="([\w.-]+/[\w.-]+)"', file.read_text(encoding="utf-8")) for file in files)
    return [match[1] for match in found if match]


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The first class name in a config.json."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) and first.isidentifier() else None


def _commit(model_id: str, revision: str | None) -> str | None:
    """Commit of the Hub repository that the config comes from, which newer versions of transformers do not store."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model_id).is_dir():
        return None
    return commit_of(try_to_load_from_cache(model_id, "config.json", revision=revision))


def model_class(config: Any, auto_class: str | None = None) -> Any:
    """The named class of transformers, else the first one in a config's `architectures`."""
    import transformers

    if auto_class is not None:
        if not hasattr(transformers, auto_class):
            raise InvalidArgument(f"unknown transformers class {auto_class!r}")
        return getattr(transformers, auto_class)
    names = getattr(config, "architectures", None) or []
    known = (name for name in names if isinstance(name, str) and hasattr(transformers, name))
    return next((getattr(transformers, name) for name in known), transformers.AutoModel)


def _skeleton(cls: Any, config: Any, unused: dict[str, Any], *, meta: bool) -> nn.Module:
    """The model without its weights: on the meta device, or with random weights."""
    known = {key: unused.pop(key) for key in ("dtype", "torch_dtype", "attn_implementation") if key in unused}
    unused = {key: value for key, value in unused.items() if key not in ("revision", "token", "cache_dir")}
    if unused:
        raise InvalidArgument(f"unknown argument of {type(config).__name__}: {', '.join(sorted(unused))}")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton is the float model
    build = cls.from_config if hasattr(cls, "from_config") else cls._from_config
    if not meta:
        model = build(config, **known)
    else:
        try:
            with torch.device("meta"), _LiteralsHaveValues():
                model = build(config, **known)
        except RuntimeError:  # it combines a literal with a meta tensor
            with torch.device("meta"):
                model = build(config, **known)
    tie(model)
    return model.eval()  # type: ignore[no-any-return]


def tie(model: Any, *, only_meta: bool = False) -> None:
    """Tie weights that transformers left untied.

    transformers disables `tie_weights` for all classes while it builds a model. Models that several threads build at
    once, and later ones, then have untied weights or stay partly on the meta device.

    Args:
        model: A transformers model.
        only_meta: Leave Parameters that are not on the meta device unchanged.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        mine, shared = parameters.get(target), parameters.get(source)
        if mine is not None and shared is not None and mine is not shared and (mine.is_meta or not only_meta):
            owner, _, name = target.rpartition(".")
            setattr(model.get_submodule(owner), name, shared)


class _LiteralsHaveValues(TorchFunctionMode):
    """Put integer tensors made from literals on the CPU whatever the default device is, such as the strides and
    paddings of a codec's layers, which its forward reads."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and "device" not in kwargs:
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made.to("meta") if made.is_floating_point() else made
        return func(*args, **kwargs)


def _fill(model: nn.Module, file: Path) -> None:
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise HubMPQError(
            f"{file.name} does not match the model: missing {missing[:3]} and {max(0, len(missing) - 3)} more, "
            f"unexpected {unexpected[:3]} and {max(0, len(unexpected) - 3)} more"
        )


def head_of(model: nn.Module) -> tuple[str, ...]:
    """The language model head, else the layers outside the base model with as many outputs as the last of them (a
    distilled model has two classifiers); () for a bare encoder."""
    outside = [name for name, module in model.named_modules() if layer_kind(module)]
    with contextlib.suppress(AttributeError, NotImplementedError):
        output = model.get_output_embeddings()  # type: ignore[operator]
        found = tuple(name for name in outside if model.get_submodule(name) is output)
        if found:
            return found
    base = getattr(model, "base_model_prefix", "")
    if not base or not isinstance(getattr(model, base, None), nn.Module):
        return ()
    outside = [name for name in outside if not name.startswith(f"{base}.")]
    outputs = {name: model.get_parameter(f"{name}.weight").shape[0] for name in outside}
    return tuple(name for name in outside if outputs[name] == outputs[outside[-1]])


def preprocess_of(model_id: str, example: Mapping[str, Any]) -> dict[str, Any]:
    """Where to find the tokenizer or processor of a model: {"tokenizer" or "processor": its id or folder, …}."""
    found = {"processor": model_id} if example.keys() - {"input_ids", "decoder_input_ids"} else {}
    if "input_ids" not in example:
        return found
    return {**found, "tokenizer": model_id, "sequence_length": example["input_ids"].shape[1]}
