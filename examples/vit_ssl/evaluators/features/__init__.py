"""Frozen features: the encoders they come from, their extraction, and their cache."""
