"""The result of the solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Solution:
    """One choice per layer, with its proof of optimality.

    Args:
        status: "optimal" (proved: `bound` equals `objective` and `gap` is 0) or "feasible" (the time limit was
            reached).
        objective: Sum of the chosen scores, in the sense of the table.
        bound: Bound on the objective of any policy.
        gap: Relative distance, `|objective − bound| / max(|objective|, |bound|)`.
        seconds: Wall time of the whole call.
        choices: {layer: choice}.
        usage: {limit: amount used}; an int if all costs are.

    Example:
        >>> from hub_mpq.solve import solve_table
        >>> layers = {"fc": {"4": {"score": 2.0}, "8": {"score": 1.0}}}
        >>> solution = solve_table({"sense": "min", "layers": layers})
        >>> solution.status, solution.objective, solution.choices
        ('optimal', 1.0, {'fc': '8'})
    """

    status: str
    objective: float
    bound: float
    gap: float
    seconds: float
    choices: Mapping[str, str]
    usage: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Convert the solution to JSON values.

        Returns:
            {field: value}.
        """
        return asdict(self)
