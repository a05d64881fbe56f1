"""Parts that a test needs and that not every machine has: an engine, a browser, an interpreter."""

import os
from typing import NoReturn

import pytest


def absent(reason: str) -> NoReturn:
    """Skip the test for `reason` on a user's machine, and fail it where all must be there: with KERNELM_REQUIRE_ALL, as in CI."""
    if os.environ.get("KERNELM_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)
