"""Landmark retrieval on revisited Oxford and Paris."""
