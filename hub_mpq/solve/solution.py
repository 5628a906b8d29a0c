"""What the solver answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Solution:
    """One choice a layer, and the proof that goes with it.

    `status`: "optimal" (proved: `bound` is `objective`, `gap` is 0) or "feasible" (the time limit struck first).
    `objective`: sum of the chosen scores, in the table's own sense; `bound`: no policy is better than this.
    `gap`: |objective − bound| / max(|objective|, |bound|). `seconds`: wall time of the whole call.
    `choices`: {layer: choice}. `usage`: {limit: amount used}, an int where every cost is one.
    """

    status: str
    objective: float
    bound: float
    gap: float
    seconds: float
    choices: Mapping[str, str]
    usage: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)
