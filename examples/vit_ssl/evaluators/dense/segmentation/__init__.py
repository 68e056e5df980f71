"""Semantic segmentation by the features of patches."""
