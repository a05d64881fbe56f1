"""Goodput: `plugin.py` is all of it."""
