"""What keeps prototypes distinct, and to how few of them a trained head can be compressed."""

from benchmarks.distinct.report import table
from benchmarks.distinct.run import distinct

__all__ = ["distinct", "table"]
