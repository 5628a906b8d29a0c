"""What a model wants its images to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidArgument


def data_config(preprocess: Mapping[str, Any], input_shape: Sequence[int]) -> dict[str, Any]:
    """{input_size, mean, std, interpolation, crop_pct} from timm's data config, or from nothing but a shape."""
    if len(input_shape) != 3:
        raise InvalidArgument(
            f"the model takes inputs of shape {'×'.join(map(str, input_shape))}, not images; "
            "use hub_mpq from Python with a loader of your own"
        )
    channels = int(input_shape[0])

    def per_channel(name: str, default: float) -> tuple[float, ...]:
        values = tuple(preprocess.get(name) or (default,))
        return values if len(values) == channels else (sum(values) / len(values),) * channels

    return {
        "input_size": tuple(int(n) for n in input_shape),
        "mean": per_channel("mean", 0.5),
        "std": per_channel("std", 0.5),
        "interpolation": preprocess.get("interpolation") or "bilinear",
        "crop_pct": preprocess.get("crop_pct") or 1.0,
    }
