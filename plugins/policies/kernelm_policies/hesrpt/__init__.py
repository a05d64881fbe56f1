"""Goodput weighted by what is left: `plugin.py` is all of it."""
