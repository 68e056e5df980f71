"""Table 1 and Figure 2 of the paper in small, on Fashion-MNIST."""

from benchmarks.fashion.run import fashion

__all__ = ["fashion"]
