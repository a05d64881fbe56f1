"""What the command sets up for a process of its own is undone after each test that runs it in this one."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """`kernelm up` logs to the stderr of then, which is closed when later tests log."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
