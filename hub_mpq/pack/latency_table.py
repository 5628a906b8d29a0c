"""A table of times as a JSON file."""

from __future__ import annotations

import json
import os

from ..core import LatencyTable
from .atomic import write_atomic


def write_latency_table(path: str | os.PathLike[str], table: LatencyTable) -> int:
    """Write a table atomically and return the bytes; `hub_mpq.read_latency_table` reads it."""
    return write_atomic(path, [(json.dumps(table.to_dict(), indent=1, allow_nan=False) + "\n").encode()])
