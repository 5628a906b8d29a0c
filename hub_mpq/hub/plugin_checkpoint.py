"""Checkpoints of transformers' Trainer: the training state next to the packed file.

Trainer saves a checkpoint with the model's `save_pretrained` and reads its model.safetensors with `load_state_dict`, to
resume and to load the best model. The packed file lacks what training needs: the float weights behind the quantizers.
So model.safetensors of a checkpoint holds the whole state dict, under names of our own, and one weight without
elements: loading the file as float weights fails with a wrong shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..core import Policy
from ..errors import InvalidArgument
from ..nn.packing import float_state

_CONTENT = "mpq-training"
_STATE = "mpq_training_state."
_POLICY = "mpq_training_policy"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name that Trainer gives its checkpoints."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # it imports the models that wait for this plug-in

    prefix, _, step = folder.name.rpartition("-")
    return prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal()


def is_training_state(file: Path) -> bool:
    """Whether a file was written by `training_state`."""
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("content") == _CONTENT
    except (OSError, SafetensorError):
        return False


def training_state(model: nn.Module, policy: Policy) -> bytes:
    """The state of a quantized model in training as a safetensors file, for `restore_from_checkpoints`.

    Args:
        model: The model, with quantizers.
        policy: Its bit-widths.

    Returns:
        The content of the file.
    """
    own = model.state_dict()
    state = {_STATE + key: own[key].cpu().contiguous() for key in dict.fromkeys(_first_names(model).values())}
    plain = float_state(model)
    guard = {next(name for name, _ in model.named_parameters() if name in plain): torch.empty(0)}
    return save({**state, **guard, _POLICY: _policy_tensor(policy)}, metadata={"format": "pt", "content": _CONTENT})


def restore_from_checkpoints(model: nn.Module) -> None:
    """Let `model.load_state_dict` accept what `training_state` saved.

    Loading raises InvalidArgument for the state of another policy.

    Args:
        model: A transformers model with quantizers, whose `hf_quantizer` knows the policy.
    """
    model.register_load_state_dict_pre_hook(_restore)


def _restore(model: Any, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Restore the names of the tensors of a training state; does nothing to other states."""
    if (policy := state_dict.pop(prefix + _POLICY, None)) is None:
        return
    if not torch.equal(policy, _policy_tensor(model.hf_quantizer.manifest.policy)):
        raise InvalidArgument(
            "the checkpoint was trained with a different policy than the model has; first apply the policy in the "
            "checkpoint's config.json to the model"
        )
    marked = prefix + _STATE
    saved = {key.removeprefix(marked): state_dict.pop(key) for key in list(state_dict) if key.startswith(marked)}
    tied = {key: saved[first] for key, first in _first_names(model).items() if first in saved}
    state_dict.update({prefix + key: tensor for key, tensor in {**saved, **tied}.items()})


def _first_names(model: nn.Module) -> dict[str, str]:
    """{name in the state dict: the first name of the same tensor}: tied weights are stored once."""
    firsts: dict[int, str] = {}
    return {key: firsts.setdefault(id(tensor), key) for key, tensor in model.state_dict(keep_vars=True).items()}


def _policy_tensor(policy: Policy) -> Tensor:
    """A policy as the bytes of its JSON."""
    return torch.tensor(list(json.dumps(policy.to_dict(), sort_keys=True).encode()), dtype=torch.uint8)
