"""The exact solver: from a table of scores and costs to the provably best choice per layer. NumPy and SCIP only."""

from .solution import Solution
from .solve import solve_table

__all__ = ["Solution", "solve_table"]
