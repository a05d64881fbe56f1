"""The trainer plugin: a dataset becomes a model (`trainer/1`). Start reading at `training.py`."""
