"""kernelm's optimizer: finds the better model, makes it cheaper, and proves it. Start reading in `plugin.py`."""
