"""Least attained service: `plugin.py` is all of it."""
