"""Max-min fairness over unlike accelerators: `plugin.py` is all of it."""
