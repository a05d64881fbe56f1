"""Shortest remaining time first: `plugin.py` is all of it."""
