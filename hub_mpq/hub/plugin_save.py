"""save_pretrained of a transformers model that is quantized: the packed folder, never a packed model.safetensors."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

from ..errors import HubMPQError
from ..pack import Manifest
from .folder import save_folder
from .plugin_load import network_of

_FLOAT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def attach(model: Any, manifest: Manifest, quantizer: Any) -> None:
    """Set what transformers asks of a quantized model, and the save_pretrained that writes `manifest`'s format."""
    quantizer.quantization_config.policy = manifest.policy
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.save_pretrained = MethodType(save_pretrained, model)
    model.push_to_hub = MethodType(push_to_hub, model)


def detach(model: Any) -> None:
    """Give a model that is float again transformers' own ways to save and push."""
    del model.save_pretrained, model.push_to_hub


def forget_packed_file(model: Any) -> None:
    """Undo what loading left: config.json must never name the packed file; names on disk are transformers' default."""
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
    """As transformers' save_pretrained, writing config.json and the packed file, whole or not at all.

    One file whatever max_shard_size says. Raises HubMPQError when float weights lie in the folder: a plain load
    would take them for this model.
    """
    if getattr(self, "_hf_peft_config_loaded", False):  # adapters only
        return type(self).save_pretrained(  # type: ignore[no-any-return]
            self, save_directory, is_main_process, state_dict, push_to_hub, **kwargs
        )
    if not is_main_process:
        return None
    folder = Path(save_directory)
    if stale := [name for name in _FLOAT_FILES if (folder / name).exists()]:
        raise HubMPQError(f"{folder} holds {stale[0]}, which a plain load would take for this model; save elsewhere")
    extra = {}
    if self.can_generate():
        extra["generation_config.json"] = self.generation_config.to_json_string().encode()
    save_folder(folder, network_of(self), self.hf_quantizer.manifest, _config(self), extra=extra)
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
    """As transformers' push_to_hub, by hub_mpq.hub.publish: one commit with the card and, unless float_copy=False, the
    dequantized weights, so that no stale ones stay in the repo. max_shard_size, tags and the like are not used.
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
