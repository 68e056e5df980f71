"""How well densities and other scores tell what a network was pretrained on from other images."""

from benchmarks.ood.run import ood
from benchmarks.ood.tables import table

__all__ = ["ood", "table"]
