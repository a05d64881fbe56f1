"""Scheduling policies of the literature, each a plugin of its own behind `scheduler/1`, to compare with and to learn from."""
