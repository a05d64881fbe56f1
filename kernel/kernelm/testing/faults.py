"""Fault injection that conformance kit and fault matrix share."""

import os
from pathlib import Path


def flip(path: Path, at: int) -> None:
    """Flip the lowest bit of one byte; the file keeps its mode."""
    mode = path.stat().st_mode & 0o7777
    path.chmod(0o644)
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())
    path.chmod(mode)
