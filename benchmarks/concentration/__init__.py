"""The inverse of A_p, ours and others'."""

from benchmarks.concentration.run import concentration, table

__all__ = ["concentration", "table"]
