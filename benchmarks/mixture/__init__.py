"""Mixtures of known truth."""

from benchmarks.mixture.run import mixture

__all__ = ["mixture"]
