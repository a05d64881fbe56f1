"""The scheduler plugin: `policy.py` decides, `plugin.py` answers calls."""
