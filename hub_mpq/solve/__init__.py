"""The exact solver of tables: scores and costs in, the proved best choice of every layer out. NumPy and SCIP only."""

from .solution import Solution
from .solve import solve_table

__all__ = ["Solution", "solve_table"]
