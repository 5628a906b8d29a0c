"""Latency tables: the layer times of a model, measured on one machine and runtime."""

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
"""Key of the time of a layer that computes in float."""
MOST = {"batch_size": 10**6, "threads": 1024}
"""{field: its maximum in a table}; larger values are rejected before the machine is asked for as much."""
_NO_TIME = 1e18


@dataclass(frozen=True)
class LatencyTable:
    """The time of one call in seconds, per layer and bit-width.

    The predicted time of a policy is the sum of its layers' entries plus the constant. Each layer is timed alone, from
    float32 to float32. What consecutive layers save (codes that stay int8 between them, a norm or an activation that is
    fused) and what conversions between int8 and float layers cost is captured by two factors, for which the whole model
    is timed twice: with all layers in integers, and with all layers in float.

    Args:
        model: Id of the model.
        graph_digest: Digest of the model's layers, see `LayerGraph.digest`.
        input_shape: Shape of one input sample, without the batch axis.
        machine: Description of the processor, its cores and instruction sets.
        runtime: Name of the runtime.
        engine: The library behind the runtime and its version, such as "torch 2.14.0".
        batch_size: Samples per call.
        threads: Number of threads that a call may use.
        entries: {layer: {"W7A8": seconds, …, "float": seconds}}, already multiplied by the factors. "float" is the time
            with a float input or a group size; bit-widths that the runtime computes in float have the same time. Layers
            not listed never compute in integers and are part of the constant.
        constant: Seconds of everything but these layers, at least 0.
        factor: Factor that the times of layers in integers were multiplied by.
        float_factor: Factor that the times of layers in float were multiplied by.
        whole: Seconds of the whole model on the runtime, with all layers of `entries` in integers at their widest
            bit-widths.
        whole_float: Seconds of the whole model on the runtime, with all layers of `entries` in float.
        float_model: Seconds of the float model in torch, measured alternately with these.
        date: Date of the measurement, such as "2026-11-28".
        hub_mpq: Version of hub_mpq that measured.

    Raises:
        InvalidArgument: A field has the wrong type or is out of range.

    Example:
        >>> from hub_mpq import LatencyTable, LayerBits
        >>> table = LatencyTable(
        ...     model="toy",
        ...     graph_digest="0" * 64,
        ...     input_shape=(3, 32, 32),
        ...     machine="8 cores, AVX512",
        ...     runtime="onednn",
        ...     engine="torch 2.14.0",
        ...     batch_size=1,
        ...     threads=1,
        ...     entries={"fc": {"W4A8": 0.001, "float": 0.004}},
        ...     constant=0.005,
        ...     factor=1.0,
        ...     float_factor=1.0,
        ...     whole=0.006,
        ...     whole_float=0.009,
        ...     float_model=0.009,
        ...     date="2026-11-28",
        ...     hub_mpq="0.1.0",
        ... )
        >>> table.seconds("fc", LayerBits(4, 8)), table.command()
        (0.001, 'hub-mpq bench toy --runtime onednn -o table.json')
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
            _check(
                isinstance(value, str) and len(value) < 1000,
                f"{name} must be a string of fewer than 1000 characters, got {_short(value)}",
            )
        for name, most in MOST.items():
            value = getattr(self, name)
            _check(
                _whole(value) and 1 <= value <= most, f"{name} must be an integer from 1 to {most}, got {_short(value)}"
            )
        shape = self.input_shape
        _check(
            isinstance(shape, tuple) and all(_whole(n) and n >= 0 for n in shape),
            f"input_shape must be a list of non-negative integers, got {_short(shape)}",
        )
        _check(
            _seconds(self.constant) or self.constant == 0,
            f"constant must be a non-negative number of seconds, got {_short(self.constant)}",
        )
        for name in ("factor", "float_factor", "whole", "whole_float", "float_model"):
            _check(
                _seconds(getattr(self, name)), f"{name} must be a positive number, got {_short(getattr(self, name))}"
            )
        _check(isinstance(self.entries, Mapping), f"entries must be a mapping, got {_short(self.entries)}")
        _check(bool(self.entries) or self.constant > 0, "the table holds no times: entries is empty and constant is 0")
        for layer, row in self.entries.items():
            _check(isinstance(row, Mapping) and FLOAT in row, f"layer {layer!r} has no entry for float")
            for key, value in row.items():
                _check(
                    key == FLOAT or _is_pair(key), f"layer {layer!r}: {_short(key)} is not a valid pair of bit-widths"
                )
                _check(_seconds(value), f"layer {layer!r} at {key}: {_short(value)} is not a valid time")

    def seconds(self, layer: str, bits: LayerBits) -> float:
        """Look up the time of a layer.

        Args:
            layer: Name of the layer.
            bits: Its bit-widths.

        Returns:
            Seconds; 0 for a layer that is part of the constant.

        Raises:
            InvalidArgument: The layer was not measured at these bit-widths.
        """
        row = self.entries.get(layer)
        if row is None:
            return 0.0
        if bits.activation == FLOAT_BITS or bits.grouped:
            return row[FLOAT]
        if str(bits) not in row:
            raise InvalidArgument(
                f"the latency table has no entry for layer {layer!r} at {bits}: measure these bit-widths"
            )
        return row[str(bits)]

    def times(self, factor: float) -> LatencyTable:
        """Return the same table with all times of policies scaled.

        Args:
            factor: Multiplier of the entries, the constant and the factors.

        Returns:
            The new table.
        """
        entries = {name: {key: factor * x for key, x in row.items()} for name, row in self.entries.items()}
        return replace(
            self,
            entries=entries,
            constant=factor * self.constant,
            factor=factor * self.factor,
            float_factor=factor * self.float_factor,
        )

    def command(self, model: str = "", size: tuple[int, ...] = ()) -> str:
        """Return the shell command that measures such a table.

        Args:
            model: Id of the model to measure; "" for the table's own.
            size: Shape of one image, if it is not the model's default.

        Returns:
            The command line.
        """
        more = f"{f' --batch-size {self.batch_size}' if self.batch_size > 1 else ''}"
        more += f"{f' --threads {self.threads}' if self.threads > 1 else ''}"
        more += f" --input-size {'x'.join(map(str, size))}" if len(size) == 3 else ""
        return f"hub-mpq bench {model or self.model} --runtime {self.runtime}{more} -o table.json"

    def check(self, graph: LayerGraph) -> None:
        """Check that the table belongs to a model with these layers and this input size.

        Args:
            graph: The model's layers.

        Raises:
            InvalidArgument: The table was measured on another model or input size; the error gives the command that
                measures this one.
        """
        size: tuple[int, ...] = ()
        if self.graph_digest != graph.digest:
            why = f"was measured on {self.model!r}, whose layers differ from those of {graph.model_id!r}"
        elif unknown := self.entries.keys() - {layer.name for layer in graph}:
            why = f"names layer {min(unknown)!r}, which {graph.model_id!r} does not have"
        elif self.input_shape != graph.input_shape:
            why = (
                f"was measured with inputs of {_size(self.input_shape)}, but the model reads {_size(graph.input_shape)}"
            )
            size = graph.input_shape
        else:
            return
        raise InvalidArgument(f"the latency table {why}; measure a new one with `{self.command(graph.model_id, size)}`")

    def to_dict(self) -> dict[str, Any]:
        """Convert the table to JSON values.

        Returns:
            {field: value}.
        """
        return {**asdict(self), "input_shape": list(self.input_shape)}

    @classmethod
    def from_dict(cls, data: Any) -> LatencyTable:
        """Rebuild a table from the result of `to_dict`.

        Args:
            data: The JSON values.

        Returns:
            The table.

        Raises:
            InvalidArgument: `data` is not a valid table.
        """
        names = {f.name for f in fields(cls)}
        _check(isinstance(data, Mapping), f"expected an object, got {_short(data)}")
        _check(
            set(data) == names,
            f"missing fields {sorted(names - set(data))}, unknown fields {sorted(set(data) - names)}",
        )
        shape = data["input_shape"]
        return cls(**{**data, "input_shape": tuple(shape) if isinstance(shape, list) else shape})


def read_latency_table(path: str | os.PathLike[str]) -> LatencyTable:
    """Read a latency table from a file written by `hub-mpq bench` or `write_latency_table`.

    Args:
        path: The JSON file.

    Returns:
        The table.

    Raises:
        InvalidArgument: The file cannot be read, or is not a valid latency table.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ, read_latency_table, write_latency_table
        >>> with torch.random.fork_rng():
        ...     net = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> table = HubMPQ.from_module(net, torch.zeros(1, 8)).measure_latency("torch")
        >>> written = write_latency_table("table.json", table)
        >>> read_latency_table("table.json") == table
        True
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file, object_pairs_hook=_pairs)
        return LatencyTable.from_dict(tree)
    except OSError as error:
        raise InvalidArgument(f"cannot read latency table {os.fspath(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # an InvalidArgument is a ValueError
        raise InvalidArgument(f"{os.fspath(path)} is not a valid latency table: {error}") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate key")
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
    return "×".join(map(str, shape)) or "no shape"
