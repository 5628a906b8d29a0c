"""Build one sample for a transformers model from its config and the signature of its forward: text, image, sound."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import HubMPQError, InvalidArgument
from .base import noise
from .forward import output_on_zeros, runs_on_zeros

Inputs = dict[str, Any]
"""Keyword arguments of a forward."""

_TEXT_BESIDE = 128
"""Tokens of text added if the placeholders of an image or a sound alone reach the requested length."""
_SIDE = 224
"""Height and width of an image in pixels, if the config has none."""
_SAMPLES = 16000
"""Samples of a sound in a waveform: one second at 16 kHz."""
_FRAMES = 1000
"""Frames of a spectrogram, if the config has none."""


def example_for(model: nn.Module, sequence_length: int = 128) -> Inputs:
    """One sample with all inputs that a transformers model takes.

    A model of text and images (or sound) gets an image too, with one placeholder token per feature. If a config leaves
    the form of an input open, the common forms are tried on tensors without memory.

    Args:
        model: The model.
        sequence_length: Number of tokens, limited to what the model takes. It includes the placeholders of an image or
            a sound; if these alone reach it, 128 tokens of text are added.

    Raises:
        InvalidArgument: The main input of the model is not supported.
        HubMPQError: The model runs on none of the forms.
    """
    takes = inspect.signature(model.forward).parameters
    images, sounds = list(_images(model, takes)), list(_sounds(model, takes))
    mixed = "input_ids" in takes and (images or sounds)
    forms = [{**image, **sound} for image, sound in itertools.product(images or [{}], sounds or [{}])]
    if images and sounds:
        forms += images + sounds
    error: Exception | None = None
    for form in forms:
        try:
            example = _with_text(model, takes, form, sequence_length)
        except HubMPQError:
            raise
        except Exception as raised:  # a model may raise anything on a form that it does not take
            error = raised
            continue
        if (len(forms) == 1 and not mixed) or (found := runs_on_zeros(model, example)) is None:
            return example
        error = found
    if mixed and _main(model) == "input_ids":  # it runs on text alone; report() lists what did not run
        return _with_text(model, takes, {}, sequence_length)
    said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    raise HubMPQError(f"{type(model).__name__} runs on no known form of {_main(model)!r} [{said}]") from error


def _main(model: nn.Module) -> str:
    main: Any = getattr(model, "main_input_name", "input_ids")
    return main if isinstance(main, str) else main[0]


def _with_text(model: nn.Module, takes: Mapping[str, Any], form: Inputs, length: int) -> Inputs:
    """An image, a sound, both or neither, with the matching tokens."""
    config: Any = model.config
    example: Inputs = {}
    if "qformer_input_ids" in takes:
        form = {**form, "qformer_input_ids": torch.arange(16).unsqueeze(0)}
    if "input_ids" in takes and (form or _main(model) == "input_ids"):
        places = [
            (token, _feature_count(model, kind, form))
            for kind in ("image", "audio")
            if (token := _placeholder(config, kind)) is not None and any(kind in _KIND.get(k, "") for k in form)
        ]
        example["input_ids"] = _tokens(_words(config), length, places)
        if any(count == 1 for _, count in places):  # the features replace it, and are masked
            example["attention_mask"] = torch.ones_like(example["input_ids"])
        for name in takes:
            if name in _OF_TOKENS:
                example[name] = _OF_TOKENS[name](config, example["input_ids"], places)
    example |= form
    if not example:
        raise InvalidArgument(
            f"cannot build an example input for {type(model).__name__}: unsupported main input {_main(model)!r}"
        )
    if _has_encoder(config) and "decoder_input_ids" in takes:
        ids = _tokens(config.get_text_config(decoder=True), length)
        channels = getattr(getattr(config, "decoder_config", None), "num_channels", None)
        example["decoder_input_ids"] = ids if channels is None else ids[..., None].repeat(1, 1, channels)
    return example


def _words(config: Any) -> Any:
    """The config with the input vocabulary: the encoder's if it has its own (Dia)."""
    encoder = getattr(config, "encoder_config", None)
    if hasattr(encoder, "vocab_size"):
        return encoder
    return config.get_text_config(encoder=_has_encoder(config) or None)


def _has_encoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


# ------------------------------------------------------------------------------------------------------------ tokens


def _placeholder(config: Any, kind: str) -> int | None:
    """The placeholder token for a feature of an image or a sound."""
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next((token for name in names if isinstance(token := getattr(config, name, None), int)), None)


def _tokens(config: Any, length: int, places: list[tuple[int, int]] | None = None) -> Tensor:
    """Increasing token ids [1, length], with (token, count) runs after the first one and the end token at the end."""
    places = places or []
    count = sum(n for _, n in places)
    if count + 2 > length:
        length = count + _TEXT_BESIDE
    longest = _first(config, "max_position_embeddings", "max_target_positions", "max_text_positions")
    length = min(length, longest) if isinstance(longest, int) and longest > count else length
    words = config.vocab_size
    ids = torch.arange(length) % words
    taken = [token for token, _ in places]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < words:
        ids[ids == end] = (end + 1) % words  # some classifiers read the state of the only end token
        ids[-1] = end
    while taken and torch.isin(ids, torch.tensor(taken)).any():
        ids[torch.isin(ids, torch.tensor(taken))] = int(ids.min())
    start = 1
    for token, n in places:
        ids[start : start + n] = token
        start += n
    return ids.unsqueeze(0)


def _kinds_of_tokens(config: Any, ids: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """1 for placeholders of an image, 0 for text."""
    image = _placeholder(config, "image")
    return (ids == (-1 if image is None else image)).long()


def _embeds_mask(config: Any, ids: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """1 for the tokens whose embeddings are replaced by an image."""
    mask = torch.zeros_like(ids)
    mask[:, 1 : 1 + config.latent_query_num] = 1
    return mask


def _first_token_sees_all(config: Any, ids: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """1 for the first token, whose attention is global, as a classifier's is."""
    return (torch.arange(ids.shape[1]) == 0).long()[None]


_OF_TOKENS = {
    "global_attention_mask": _first_token_sees_all,
    "mm_token_type_ids": _kinds_of_tokens,
    "image_embeds_position_mask": _embeds_mask,
}
"""{argument of a forward: function that builds it from the config, the token ids and the placeholders}"""
_KIND = {
    "pixel_values": "image",
    "flattened_patches": "image",
    "input_features": "audio",
    "input_values": "audio",
}


def _feature_count(model: nn.Module, kind: str, form: Inputs) -> int:
    """Number of features of an image or a sound; 1 (one token for all) if the model has no method to compute them."""
    method = f"get_{kind}_features"
    owner = next((module for module in model.modules() if hasattr(module, method)), None)
    if owner is None:
        return 1
    asked = inspect.signature(getattr(owner, method)).parameters
    open_ended = any(p.kind is p.VAR_POSITIONAL for p in asked.values())  # it passes on what it gets
    given = {k: v for k, v in form.items() if k in asked or open_ended}
    out = output_on_zeros(_Asked(owner, method), given)
    features = out.pooler_output if getattr(out, "pooler_output", None) is not None else out
    return sum(x.shape[:-1].numel() for x in tree_leaves(features) if isinstance(x, Tensor))


class _Asked(nn.Module):
    """A module whose forward is another method of the wrapped module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, **kwargs: Any) -> Any:
        return getattr(self.module, self.method)(**kwargs)


# ------------------------------------------------------------------------------------------------------------ images


def _images(model: nn.Module, takes: Mapping[str, Any]) -> Iterator[Inputs]:
    """Forms in which a model may take an image, the likeliest first."""
    if "pixel_values" not in takes and "pixel_values_videos" not in takes:
        return
    config: Any = model.config
    vision = (
        _part(_part(config, "encoder"), "vision_config") if _has_encoder(config) else _part(config, "vision_config")
    )
    channels, height, width = _image_shape(vision)
    if "image_grid_thw" in takes:
        merge = _first(vision, "spatial_merge_size", "merge_size") or 1
        patch = _first(vision, "spatial_patch_size", "patch_size")
        cells = max(_SIDE // patch // (2 * merge), 1) * 2 * merge
        values = channels * (_first(vision, "temporal_patch_size") or 1) * patch**2
        grid = {"image_grid_thw": torch.tensor([[1, cells, cells]])}
        yield {"pixel_values": noise(cells**2, values, like=model), **grid}
        yield {"pixel_values": noise(cells**2, channels, patch, patch, like=model), **grid}
        yield {"pixel_values": noise(1, cells**2, channels, patch, patch, like=model), **grid}
    elif "spatial_shapes" in takes:
        side = int((_first(vision, "num_patches") or 256) ** 0.5)
        yield {
            "pixel_values": noise(1, side**2, channels * vision.patch_size**2, like=model),
            "pixel_attention_mask": torch.ones(1, side**2, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]]),
        }
    elif "aspect_ratio_ids" in takes:
        tiles = vision.max_num_tiles
        yield {
            "pixel_values": noise(1, 1, tiles, channels, height, width, like=model),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": (torch.arange(tiles) == 0).long()[None, None],
        }
    elif "pixel_values" not in takes or (frames := _first(vision, "num_frames")):
        frames = _first(vision, "num_frames", "frames_per_clip") or 8
        name = "pixel_values" if "pixel_values" in takes else "pixel_values_videos"
        yield {name: noise(1, frames, channels, height, width, like=model)}
    else:
        one = noise(1, channels, height, width, like=model)
        several = "input_ids" in takes
        if "image_sizes" not in takes or not several:
            yield {"pixel_values": one}
        if several:
            size = {"image_sizes": torch.tensor([[height, width]])} if "image_sizes" in takes else {}
            if size:
                yield {"pixel_values": one, **size}
                yield {"pixel_values": one}
            for tiles in (1, 3, 2, 5):
                yield {"pixel_values": one[None].repeat(1, tiles, 1, 1, 1), **size}


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None) or _SIDE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return _first(config, "num_channels", "in_channels", "in_chans") or 3, height, width


# ------------------------------------------------------------------------------------------------------------ sounds


def _sounds(model: nn.Module, takes: Mapping[str, Any]) -> Iterator[Inputs]:
    """Forms in which a model may take a sound, the likeliest first."""
    name = next((n for n in ("input_features", "input_values") if n in takes), None)
    if name is None:
        return
    audio = _part(model.config, "audio_config", "encoder_config")
    bins = _first(
        audio, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "n_mels"
    )
    positions = _first(audio, "max_source_positions")
    frames = 2 * positions if positions and positions < 3000 else _first(audio, "max_length") or _FRAMES

    def forms(*shape: int, of_frames: int) -> Iterator[Inputs]:
        values = {name: noise(*shape, like=model)}
        masks = {n: torch.ones(1, of_frames, dtype=torch.long) for n in _MASKS if n in takes}
        if masks:
            yield {**values, **masks}
        yield values

    if bins is not None and name == "input_values":
        yield from forms(1, frames, bins, of_frames=frames)
    if name == "input_values":  # a waveform model may have bins for its output
        channels = _first(audio, "audio_channels", "num_channels") or 1
        waves = [(1, _SAMPLES), (1, channels, _SAMPLES)]
        codec = not {"audio_codes", "n_quantizers", "num_quantizers"}.isdisjoint(takes)
        for shape in reversed(waves) if codec else waves[:1]:
            yield {name: noise(*shape, like=model)}
    elif bins is not None:
        square = _first(audio, "spec_size")
        if square:  # an image of the spectrogram
            yield from forms(1, 1, square**2 // bins, bins, of_frames=square**2 // bins)
        yield from forms(1, bins, frames, of_frames=frames)
        yield from forms(1, frames, bins, of_frames=frames)


_MASKS = ("feature_attention_mask", "input_features_mask")


def _part(config: Any, *names: str) -> Any:
    """The config of a tower, or the whole config."""
    return next((part for name in names if hasattr(part := getattr(config, name, None), "to_dict")), config)


def _first(config: Any, *names: str) -> Any:
    """The first of the named values that a config has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
