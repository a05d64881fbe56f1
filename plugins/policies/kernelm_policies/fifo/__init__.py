"""First in, first out: `plugin.py` is all of it."""
