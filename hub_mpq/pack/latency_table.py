"""Latency tables as JSON files."""

from __future__ import annotations

import json
import os

from ..core import LatencyTable
from .atomic import write_atomic


def write_latency_table(path: str | os.PathLike[str], table: LatencyTable) -> int:
    """Write a latency table as JSON, atomically; `hub_mpq.read_latency_table` reads it.

    Args:
        path: The file.
        table: The table.

    Returns:
        Size of the file in bytes.

    Raises:
        HubMPQError: The file cannot be written.

    Example:
        >>> from hub_mpq import HubMPQ, read_latency_table
        >>> from hub_mpq.pack import write_latency_table
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> table = mpq.measure_latency("torch")
        >>> size = write_latency_table("table.json", table)
        >>> read_latency_table("table.json") == table
        True
    """
    return write_atomic(path, [(json.dumps(table.to_dict(), indent=1, allow_nan=False) + "\n").encode()])
