"""Indicators on disk, in the same container as packed weights."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..core import Indicators, LayerBits, check_width
from ..errors import InvalidArgument, PackedFormat
from . import container
from .canonical import dump_json, load_json

INDICATORS = "mpq-indicators"


def _rows(name: str, scales: Mapping[int, float]) -> Tensor:
    rows = [(float(bits), float(scales[bits])) for bits in sorted(scales)]
    return _checked(name, torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 2))


def _checked(name: str, rows: Tensor) -> Tensor:
    good = rows.dtype == torch.float64 and rows.dim() == 2 and rows.shape[1] == 2
    if not good or not bool((torch.isfinite(rows) & (rows > 0)).all()):
        raise InvalidArgument(f"tensor {name!r}: expected rows of (bits, scale), finite and positive")
    widths = [check_width(int(b)) if b == int(b) else check_width(b) for b in rows[:, 0].tolist()]
    if sorted(set(widths)) != widths:
        raise InvalidArgument(f"tensor {name!r}: bit-widths must be ascending")
    return rows


def _pairs(name: str, scores: Mapping[LayerBits, float]) -> Tensor:
    """Rows of (weight bits, activation bits, score).

    If any weight has groups or zero points, each row also has the group size (0 for none), and 1 for zero points, else
    0.
    """
    grouped = any(bits.grouped for bits in scores)
    rows = []
    for bits in sorted(scores):
        row = [bits.weight, bits.activation, scores[bits], bits.group_size or 0, not bits.symmetric]
        rows.append([float(x) for x in (row if grouped else row[:3])])
    table = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 5 if grouped else 3)
    _read_pairs(name, table)
    return table


def _read_pairs(name: str, rows: Tensor) -> dict[LayerBits, float]:
    good = rows.dtype == torch.float64 and rows.dim() == 2 and rows.shape[1] in (3, 5)
    if not good or not bool(torch.isfinite(rows).all()):
        raise InvalidArgument(f"tensor {name!r}: expected rows of (weight bits, activation bits, score), all finite")
    out: dict[LayerBits, float] = {}
    for weight, activation, score, *groups in rows.tolist():
        size, zero = (_whole(name, x) for x in groups or (0, 0))
        if zero not in (0, 1):
            raise InvalidArgument(f"tensor {name!r}: the column of zero points must be 0 or 1, got {zero}")
        out[LayerBits(_whole(name, weight), _whole(name, activation), size or None, not zero)] = score
    if list(out) != sorted(out) or len(out) != len(rows):
        raise InvalidArgument(f"tensor {name!r}: pairs of bit-widths must be ascending")
    return out


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise InvalidArgument(f"tensor {name!r}: a bit-width must be an integer, got {value}")
    return int(value)


def _signed(value: object) -> dict[str, bool]:
    if not isinstance(value, Mapping) or not all(isinstance(v, bool) for v in value.values()):
        raise InvalidArgument("activation_signed must be true or false for each layer")
    return dict(value)


def write_indicators(path: str | os.PathLike[str], indicators: Indicators) -> int:
    """Write indicators atomically; on an error, an existing file is not changed.

    Args:
        path: The file.
        indicators: The indicators.

    Returns:
        Size of the file in bytes.

    Raises:
        InvalidArgument: A bit-width is not 1 to 8, an indicator is not positive, or a score of a pair is not finite.
        HubMPQError: The file cannot be written.

    Example:
        >>> from hub_mpq import Indicators
        >>> from hub_mpq.pack import read_indicators, write_indicators
        >>> indicators = Indicators({"fc": {2: 0.5, 4: 0.1}}, {"fc": {2: 0.4, 4: 0.2}}, {"fc": False})
        >>> size = write_indicators("indicators.safetensors", indicators)
        >>> read_indicators("indicators.safetensors").weight
        {'fc': {2: 0.5, 4: 0.1}}
    """
    tensors = {}
    for side in ("weight", "activation"):
        for layer, scales in getattr(indicators, side).items():
            tensors[f"{side}/{layer}"] = _rows(f"{side}/{layer}", scales)
    for layer, scores in indicators.pairs.items():
        tensors[f"pair/{layer}"] = _pairs(f"pair/{layer}", scores)
    text = dump_json(
        {"activation_signed": _signed(indicators.activation_signed), "provenance": dict(indicators.provenance)}
    )
    grouped = any(bits.grouped for scores in indicators.pairs.values() for bits in scores)
    return container.write(path, INDICATORS, text, tensors, 0, 2 if grouped else 1)


def read_indicators(path: str | os.PathLike[str]) -> Indicators:
    """Read indicators, verifying every byte.

    Args:
        path: The file.

    Returns:
        The indicators.

    Raises:
        PackedFormat: The file is incomplete, was modified, or has another format.
        OSError: The file cannot be opened.

    Example:
        >>> from hub_mpq import Indicators
        >>> from hub_mpq.pack import read_indicators, write_indicators
        >>> size = write_indicators("indicators.safetensors", Indicators({"fc": {4: 0.1}}, {"fc": {4: 0.2}}, {}))
        >>> read_indicators("indicators.safetensors").activation
        {'fc': {4: 0.2}}
    """
    head, tensors = container.read(path, INDICATORS)
    try:
        tree = load_json(head.manifest, "the manifest")
        if not isinstance(tree, dict) or set(tree) != {"activation_signed", "provenance"}:
            raise InvalidArgument("the manifest must have the keys activation_signed and provenance")
        signed, provenance = _signed(tree["activation_signed"]), tree["provenance"]
        if not isinstance(provenance, dict):
            raise InvalidArgument("provenance must be an object")
        sides: dict[str, dict[str, dict[int, float]]] = {"weight": {}, "activation": {}}
        pairs: dict[str, dict[LayerBits, float]] = {}
        for name, rows in tensors.items():
            side, slash, layer = name.partition("/")
            if side == "pair" and slash:
                pairs[layer] = _read_pairs(name, rows)
            elif side in sides and slash:
                sides[side][layer] = {int(bits): scale for bits, scale in _checked(name, rows).tolist()}
            else:
                raise InvalidArgument(f"tensor {name!r}: expected weight/<layer>, activation/<layer> or pair/<layer>")
        out = Indicators(sides["weight"], sides["activation"], signed, provenance, pairs)
        _check_provenance(out)
        return out
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def _check_provenance(indicators: Indicators) -> None:
    """Raise InvalidArgument for entries of the provenance that are not what `Indicators` expects."""
    facts = indicators.provenance
    for key, kind in (("strategy", str), ("unit", str), ("seed", int), ("task", str)):
        if key in facts and (type(facts[key]) is not kind or len(str(facts[key])) > 200):
            raise InvalidArgument(f"provenance: {key} must be a short {kind.__name__}, got {str(facts[key])[:40]!r}")
    seconds = facts.get("seconds", 0)
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9:
        raise InvalidArgument(f"provenance: seconds must be a number, got {str(seconds)[:40]!r}")
    try:
        indicators.inferred  # noqa: B018 (it is parsed here)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(f"provenance: {error}") from None
    if indicators.pairs and (indicators.weight or indicators.activation):
        raise InvalidArgument("scores must be of pairs of bit-widths, or of weights and activations, but not of both")
    if indicators.sense not in ("min", "max"):
        raise InvalidArgument(f"provenance: sense must be 'min' or 'max', got {indicators.sense[:40]!r}")
