"""Seeing a run while it trains: measures of the teacher's features, on a small sample, and a page of curves."""
