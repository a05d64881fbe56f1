"""The table of the mutation set, at the end of the run whatever became of it."""

from typing import Any

import pytest

TABLE = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> list[str]:
    """Lines for the end of the run."""
    return pytestconfig.stash.setdefault(TABLE, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print them."""
    if lines := config.stash.get(TABLE, []):
        terminalreporter.write_sep("=", "broken plugins, and what caught them")
        for line in lines:
            terminalreporter.write_line(line)
