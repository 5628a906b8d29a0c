"""The "mpq" quantizer of transformers: AutoModel.from_pretrained loads packed folders, and quantizes float models."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..adapters.base import commit_of
from ..adapters.transformers import tie
from ..core import Budget, LayerBits, Policy
from ..core.bits import check_group_size
from ..core.files import FLOAT_COPY, PACKED
from ..errors import HubMPQError, InvalidArgument, PackedFormat
from ..nn.packed import packed_layers
from ..pack.atomic_folder import finish_interrupted
from ..pack.header import FORMAT_VERSION
from ..train.round_weights import check_rounding
from ..versions import warn_if_untested
from .folder import save_folder
from .load import cached_folder, check_folder
from .plugin_checkpoint import is_checkpoint, is_training_state, restore_from_checkpoints, training_state
from .plugin_load import become_packed, fill_scales, network_of, to_float

if TYPE_CHECKING:
    from ..pack import Manifest

METHOD = "mpq"
_FLOAT_FILES = (
    FLOAT_COPY,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class MPQConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed folder; also quantizes a float model while transformers loads it.

    Pass either a policy or a budget. Only the policy is stored in config.json.

    Args:
        policy: A `Policy`, its dict, or a level ("W4A8") for all searched layers.
        calibration: Batches to calibrate the scales of inputs on; None for synthetic inputs.
        per_channel: One weight scale per output channel; False: one per tensor.
        group_size: Number of weights of a row that share a scale, at least 8, typically 32, 64 or 128, in searched
            layers whose policy names none; with a budget, in all searched layers. None: no groups.
        symmetric: False adds zero points to the scales of these layers.
        rounding: "gptq" or "nearest", see `HubMPQ.apply_policy`. None: "gptq" for a weight-only policy with calibration
            data, else "nearest".
        exclude: Patterns of layers to leave float.
        quant_method: Always "mpq", as in config.json.
        format_version: Version of the packed format, as in config.json.
        budget: A `Budget` or a dict of limits. The best policy within it is searched with the scores stored next to the
            model, or with data-free scores.
        **limits: Limits of the budget by name, as in `HubMPQ.search` (`bitops=`, `size=`, …).

    Raises:
        InvalidArgument: Neither or both of policy and budget are given, or a value is not valid.

    Example:
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> from hub_mpq import MPQConfig
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained("tiny-bert")
        >>> model = AutoModel.from_pretrained("tiny-bert", quantization_config=MPQConfig("W4A32"))
        >>> model.save_pretrained("tiny-bert-w4")
        >>> AutoModel.from_pretrained("tiny-bert-w4").config.quantization_config.to_dict()["quant_method"]
        'mpq'
    """

    def __init__(
        self,
        policy: Policy | Mapping[str, Any] | str | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        per_channel: bool = True,
        group_size: int | None = None,
        symmetric: bool = True,
        rounding: str | None = None,
        exclude: Iterable[str] = (),
        quant_method: str = METHOD,
        format_version: int = FORMAT_VERSION,
        budget: Budget | Mapping[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        if quant_method != METHOD:
            raise InvalidArgument(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        self.budget = Budget.of(budget, limits)
        if (policy is None) == (self.budget is None):
            raise InvalidArgument("MPQConfig requires either a policy or a budget, for example bitops='W4A8'")
        self.quant_method = METHOD
        self.format_version = format_version
        self.policy = _policy(policy)
        self.calibration = calibration
        self.per_channel = per_channel
        check_rounding(rounding)
        self.group_size, self.symmetric, self.rounding = check_group_size(group_size), symmetric, rounding
        self.exclude = tuple(exclude)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds.

        Returns:
            `{"quant_method": "mpq", "format_version": version, "policy": policy as a dict or a level}`.
        """
        policy = self.policy.to_dict() if isinstance(self.policy, Policy) else self.policy and str(self.policy)
        version = self.format_version
        if isinstance(self.policy, Policy):
            version = 2 if any(bits.grouped for bits in self.policy.bits.values()) else 1
        return {"quant_method": self.quant_method, "format_version": version, "policy": policy}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


def _policy(value: Policy | Mapping[str, Any] | str | None) -> Policy | LayerBits | None:
    if isinstance(value, str):
        return LayerBits.parse(value)
    if isinstance(value, Mapping):
        try:
            return Policy.from_dict(value)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"quantization_config: the policy is not valid: {error!r}") from None
    return value


class MPQHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Load packed weights into packed layers, or quantize a float model after it is loaded.

    Attributes:
        manifest: The manifest of the packed file, once it is loaded.
        commit: Commit of the Hub repo that the weights came from, if any.
        source: The name that the config was loaded from, and its commit.
        trainable: Whether the layers have float weights behind quantizers.
    """

    quantization_config: Any
    manifest: Manifest | None = None
    commit: str | None = None
    source: tuple[str, str | None] = ("", None)
    trainable = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        warn_if_untested("transformers")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise HubMPQError("packed weights cannot be offloaded to disk; remove 'disk' from the device_map")
        version = self.quantization_config.format_version
        if self.pre_quantized and version not in range(1, FORMAT_VERSION + 1):
            raise PackedFormat("config.json", f"format_version {version!r} is unknown; the newest is {FORMAT_VERSION}")

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the packed file; transformers calls this before it looks for files.

        config.json never names the packed file: a load without this plug-in must find the float copy or nothing.
        """
        if self.pre_quantized:
            config.transformers_weights = PACKED
            self.source = config.name_or_path, getattr(config, "_commit_hash", None)
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Check the folder; transformers calls this after it has found the files and before it builds the model.

        It is the last point at which a config.json that describes another network is refused at no cost. Only the Auto
        classes have set the config's name by then.
        """
        if self.pre_quantized and (folder := cached_folder(*self.source)) is not None:
            check_folder(folder, {})
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.commit = commit_of(checkpoint_files[0]) if checkpoint_files else None
        if self.pre_quantized:
            if not checkpoint_files:
                raise HubMPQError("packed weights must be loaded from a file, not from a state dict")
            if finish_interrupted(Path(checkpoint_files[0]).parent):
                raise HubMPQError("an interrupted save into this folder has now been completed; load it again")
            dtype = dtype or torch.get_default_dtype()
            self.manifest = become_packed(model, checkpoint_files[0], self.quantization_config.policy, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _forget_packed_file(model)
        tie(model, only_meta=True)
        fill_scales(network_of(model))
        if not self.pre_quantized:
            from .plugin_quantize import quantize_in_place

            self.manifest = quantize_in_place(model, self.quantization_config, self.commit)
            self.trainable = True
        if self.manifest is None:
            raise HubMPQError("no weights were loaded")
        _attach(model, self.manifest, self)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if not any(packed_layers(model)):
            raise HubMPQError("a model with trainable quantizers cannot be dequantized; save and reload it first")
        to_float(model, dtype or torch.get_default_dtype())
        _detach(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """False; the model's save_pretrained is replaced by ours.

        transformers' own would write packed tensors as model.safetensors, which a plain load takes for a model without
        weights.
        """
        return False

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained on top of packed weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True if layers have float weights behind quantizers, False for packed ones."""
        return self.trainable


def _attach(model: Any, manifest: Manifest, quantizer: Any) -> None:
    """Set the attributes of a quantized transformers model, and the save_pretrained of `manifest`'s format."""
    quantizer.quantization_config.policy = manifest.policy
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.save_pretrained = _Method(save_pretrained, model)
    model.push_to_hub = _Method(push_to_hub, model)
    if quantizer.trainable:
        restore_from_checkpoints(model)


class _Method:
    """A method of one model that is kept when the model is copied or pickled.

    A bound method is pickled by its name only, and in the copy that is the method of the class: transformers'.
    """

    def __init__(self, function: Callable[..., Any], model: Any) -> None:
        self.__func__, self.__self__, self.__doc__ = function, model, function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)


def _detach(model: Any) -> None:
    """Give a model that is float again transformers' own save_pretrained and push_to_hub."""
    del model.save_pretrained, model.push_to_hub


def _forget_packed_file(model: Any) -> None:
    """Undo what loading set: config.json must never name the packed file, and names on disk are the default."""
    model.config.__dict__.pop("transformers_weights", None)
    if not getattr(model, "_weight_conversions", True):
        del model._weight_conversions


def save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Write config.json and the packed file atomically; replaces transformers' save_pretrained.

    Always one file, whatever max_shard_size says. A checkpoint of Trainer also gets the state to resume training from.

    Raises:
        HubMPQError: The folder holds float weights, which a plain load would mistake for this model.
    """
    if getattr(self, "_hf_peft_config_loaded", False):  # adapters only
        return type(self).save_pretrained(  # type: ignore[no-any-return]
            self, save_directory, is_main_process, state_dict, push_to_hub, **kwargs
        )
    if not is_main_process:
        return None
    folder = Path(save_directory)
    files = [name for name in _FLOAT_FILES if (folder / name).exists()]
    if stale := [name for name in files if not is_training_state(folder / name)]:
        raise HubMPQError(
            f"{folder} holds {stale[0]}, which a plain load would mistake for this model; save to another folder"
        )
    manifest = self.hf_quantizer.manifest
    extra = {}
    if is_checkpoint(folder) and self.hf_quantizer.trainable:
        extra[FLOAT_COPY] = training_state(self, manifest.policy)
    if self.can_generate():
        extra["generation_config.json"] = self.generation_config.to_json_string().encode()
    drop = () if FLOAT_COPY in extra else (FLOAT_COPY,)  # Trainer copies a checkpoint's to the folder it publishes
    save_folder(folder, network_of(self), manifest, _config(self), extra=extra, drop=drop)
    if push_to_hub:
        self.push_to_hub(kwargs.pop("repo_id", None) or folder.name, **kwargs)
    return None


def push_to_hub(
    self: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    float_copy: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Publish the model as `hub_mpq.hub.publish` does; replaces transformers' push_to_hub.

    One commit with the card and, unless float_copy=False, the dequantized weights, so that no stale ones stay in the
    repo. max_shard_size, tags and similar arguments are ignored.
    """
    if getattr(self, "_hf_peft_config_loaded", False):
        given = {"commit_message": commit_message, "private": private, "token": token, "revision": revision}
        return type(self).push_to_hub(self, repo_id, create_pr=create_pr, **given, **kwargs)
    from .publish import publish

    with tempfile.TemporaryDirectory(prefix="hub-mpq-push-") as folder:
        self.save_pretrained(folder)
        return publish(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            float_copy=float_copy,
            token=token,
            message=commit_message,
            model=network_of(self),
        )


def _config(model: Any) -> dict[str, Any]:
    model.config.architectures = [type(model).__name__]
    out: dict[str, Any] = model.config.to_dict()
    out.pop("quantization_config", None)
    return out


def register() -> None:
    """Register "mpq" with transformers, once; HubMPQError if transformers lacks the required hook."""
    if not hasattr(HfQuantizer, "update_attn_implementation"):
        raise HubMPQError("transformers 5.23 or newer is required: its quantizers lack update_attn_implementation")
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(MPQConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(MPQHfQuantizer)


def prepare(model: Any, manifest: Manifest) -> None:
    """Mark a transformers model that HubMPQ quantized as quantized; does nothing to other models.

    save_pretrained and push_to_hub then write the packed format, and Trainer trains it.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return
    quantizer = MPQHfQuantizer(MPQConfig(manifest.policy))
    quantizer.manifest, quantizer.trainable = manifest, True
    _attach(model, manifest, quantizer)


register()  # here, because this module may be the first to import transformers' tables
