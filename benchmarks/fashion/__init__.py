"""Table 1 and Figures 2, 6 and 7 of the paper in small, and stability, on Fashion-MNIST."""

from benchmarks.fashion.folder import fashion_folder
from benchmarks.fashion.run import fashion
from benchmarks.fashion.stability import fashion_stability

__all__ = ["fashion", "fashion_folder", "fashion_stability"]
