"""How long the layers of a model take, as it was measured on one machine and runtime."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import InvalidArgument
from .bits import FLOAT_BITS, LayerBits
from .layer import LayerGraph

FLOAT = "float"
"""The entry of a layer that computes in float."""
MOST = {"batch_size": 10**6, "threads": 1024}
"""What a table may be of: more would be asked of the machine before it is refused."""
_NO_TIME = 1e18


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one call, layer by layer and width by width.

    A policy takes the sum of its layers' entries and the constant. A layer is timed by itself, from float32 to float32;
    what layers that follow each other save (codes that stay int8 between them, a norm or an activation taken along),
    and conversions between int8 and float layers, are in two factors, for which the whole model is timed: once with all
    layers in integers, once with all in float.

    Args:
        model: Its id.
        graph_digest: Of its layers, see `LayerGraph.digest`.
        input_shape: Of one sample.
        machine: Processor, cores and instructions in words.
        runtime: What computes.
        engine: The library behind it with its version, "torch 2.14.0".
        batch_size: Samples in a call.
        threads: Threads that a call may use.
        entries: {layer: {"W7A8": seconds, …, "float": seconds}}, multiplied by the factors. "float" stands for a float
            input and for groups; pairs of widths that the runtime computes in float have the same time. Layers that
            are not named never compute in integers, and are a part of the constant.
        constant: Seconds of everything beside these layers, at least 0.
        factor: What the times of layers in integers were multiplied by.
        float_factor: What those in float were multiplied by.
        whole: Seconds of the whole model on the runtime, all layers of `entries` in integers at their widest widths.
        whole_float: The same, all of them in float.
        float_model: Seconds of the float model in torch, measured in turn with these.
        date: When, "2026-11-28".
        hub_mpq: Version of the package.
    """

    model: str
    graph_digest: str
    input_shape: tuple[int, ...]
    machine: str
    runtime: str
    engine: str
    batch_size: int
    threads: int
    entries: Mapping[str, Mapping[str, float]]
    constant: float
    factor: float
    float_factor: float
    whole: float
    whole_float: float
    float_model: float
    date: str
    hub_mpq: str

    def __post_init__(self) -> None:
        for name in ("model", "graph_digest", "machine", "runtime", "engine", "date", "hub_mpq"):
            value = getattr(self, name)
            _check(isinstance(value, str) and len(value) < 1000, f"{name} is a text, not {_short(value)}")
        for name, most in MOST.items():
            value = getattr(self, name)
            _check(
                _whole(value) and 1 <= value <= most, f"{name} is a whole number from 1 to {most}, not {_short(value)}"
            )
        shape = self.input_shape
        _check(
            isinstance(shape, tuple) and all(_whole(n) and n >= 0 for n in shape),
            f"input_shape is a list of whole numbers, not {_short(shape)}",
        )
        _check(_seconds(self.constant) or self.constant == 0, f"constant is {_short(self.constant)}")
        for name in ("factor", "float_factor", "whole", "whole_float", "float_model"):
            _check(_seconds(getattr(self, name)), f"{name} is {_short(getattr(self, name))}; it must be above zero")
        _check(isinstance(self.entries, Mapping), f"entries is {_short(self.entries)}")
        _check(bool(self.entries) or self.constant > 0, "it has no time at all")
        for layer, row in self.entries.items():
            _check(isinstance(row, Mapping) and FLOAT in row, f"layer {layer!r} has no entry for float")
            for key, value in row.items():
                _check(key == FLOAT or _is_pair(key), f"layer {layer!r}: {_short(key)} is no pair of widths")
                _check(_seconds(value), f"layer {layer!r} at {key} takes {_short(value)}, which is no time")

    def seconds(self, layer: str, bits: LayerBits) -> float:
        """The entry of a layer at these widths; 0 for a layer that the constant holds."""
        row = self.entries.get(layer)
        if row is None:
            return 0.0
        if bits.activation == FLOAT_BITS or bits.grouped:
            return row[FLOAT]
        if str(bits) not in row:
            raise InvalidArgument(f"the latency table has no entry of layer {layer!r} at {bits}: measure these widths")
        return row[str(bits)]

    def times(self, factor: float) -> LatencyTable:
        """The same table, all times of policies multiplied."""
        entries = {name: {key: factor * x for key, x in row.items()} for name, row in self.entries.items()}
        return replace(
            self,
            entries=entries,
            constant=factor * self.constant,
            factor=factor * self.factor,
            float_factor=factor * self.float_factor,
        )

    def command(self, model: str = "", size: tuple[int, ...] = ()) -> str:
        """The command that makes such a table; `size`: of images, where it is not the model's own."""
        more = f"{f' --batch-size {self.batch_size}' if self.batch_size > 1 else ''}"
        more += f"{f' --threads {self.threads}' if self.threads > 1 else ''}"
        more += f" --input-size {'x'.join(map(str, size))}" if len(size) == 3 else ""
        return f"hub-mpq bench {model or self.model} --runtime {self.runtime}{more} -o table.json"

    def check(self, graph: LayerGraph) -> None:
        """InvalidArgument unless the table is of a model with these layers and this input size."""
        size: tuple[int, ...] = ()
        if self.graph_digest != graph.digest:
            why = f"is of {self.model!r}, whose layers are not those of {graph.model_id!r}"
        elif unknown := self.entries.keys() - {layer.name for layer in graph}:
            why = f"names layer {min(unknown)!r}, which {graph.model_id!r} does not have"
        elif self.input_shape != graph.input_shape:
            why = f"is of inputs of {_size(self.input_shape)}, and the model reads {_size(graph.input_shape)}"
            size = graph.input_shape
        else:
            return
        raise InvalidArgument(f"the latency table {why}; `{self.command(graph.model_id, size)}` measures this one")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "input_shape": list(self.input_shape)}

    @classmethod
    def from_dict(cls, data: Any) -> LatencyTable:
        """The inverse of `to_dict`; InvalidArgument for anything else."""
        names = {f.name for f in fields(cls)}
        _check(isinstance(data, Mapping), f"it is {_short(data)}")
        _check(set(data) == names, f"it lacks {sorted(names - set(data))} and has {sorted(set(data) - names)} too many")
        shape = data["input_shape"]
        return cls(**{**data, "input_shape": tuple(shape) if isinstance(shape, list) else shape})


def read_latency_table(path: str | os.PathLike[str]) -> LatencyTable:
    """The table of a file that `hub-mpq bench` or `write_latency_table` wrote.

    Raises:
        InvalidArgument: There is no such file, or it is no table of times.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file, object_pairs_hook=_pairs)
        return LatencyTable.from_dict(tree)
    except OSError as error:
        raise InvalidArgument(f"latency table {os.fspath(path)!r} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # an InvalidArgument is a ValueError
        raise InvalidArgument(f"{os.fspath(path)} is no latency table: {error}") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out


def _check(good: bool, why: str) -> None:
    if not good:
        raise InvalidArgument(why)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seconds(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < _NO_TIME  # type: ignore[operator]


def _is_pair(key: object) -> bool:
    return isinstance(key, str) and re.fullmatch(r"W[1-8]A[1-8]", key) is not None


def _short(value: object) -> str:
    return repr(value)[:40]


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "no size"
