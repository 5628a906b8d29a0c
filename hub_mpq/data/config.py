"""How a model expects its images to be preprocessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidArgument


def data_config(preprocess: Mapping[str, Any], input_shape: Sequence[int]) -> dict[str, Any]:
    """Complete a timm data configuration, or derive one from the input shape alone.

    Args:
        preprocess: timm's data configuration, possibly incomplete or empty. Defaults: mean and std 0.5, bilinear
            interpolation, `crop_pct` 1.0.
        input_shape: Shape of one input, `(C, H, W)`.

    Returns:
        A dictionary with `input_size`, `mean`, `std` (one value per channel), `interpolation` and `crop_pct`. Where
        the number of channels differs from that of `preprocess`, each channel gets the mean of its values.

    Raises:
        InvalidArgument: The shape is not that of an image.

    Example:
        >>> from hub_mpq.data import data_config
        >>> data_config({"mean": (0.4,), "std": (0.2,)}, (1, 28, 28))
        {'input_size': (1, 28, 28), 'mean': (0.4,), 'std': (0.2,), 'interpolation': 'bilinear', 'crop_pct': 1.0}
    """
    if len(input_shape) != 3:
        raise InvalidArgument(
            f"expected images of shape C×H×W, but the model takes inputs of shape {'×'.join(map(str, input_shape))}; "
            "use hub_mpq from Python with your own DataLoader"
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
