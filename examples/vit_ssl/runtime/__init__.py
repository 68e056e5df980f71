"""Processes: their group, how they end, and how work is divided among them."""
