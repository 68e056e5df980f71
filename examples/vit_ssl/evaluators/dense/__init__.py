"""Evaluations of patch features: what an image shows where."""
