"""Benchmarks of vmf_heads: `python -m benchmarks --help`."""
