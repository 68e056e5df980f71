"""Fits of mixtures whose truth is known, ours and those of peers."""

from benchmarks.mixture_fit.run import mixture_fit, table

__all__ = ["mixture_fit", "table"]
