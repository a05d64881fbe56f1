"""Tables that tests fill, printed at the end of the run whatever became of it."""

from collections import defaultdict
from typing import Any

import pytest

TABLES = pytest.StashKey[defaultdict[str, list[str]]]()


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> defaultdict[str, list[str]]:
    """Title to lines."""
    return pytestconfig.stash.setdefault(TABLES, defaultdict(list))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print them."""
    for title, lines in config.stash.get(TABLES, defaultdict(list)).items():
        terminalreporter.write_sep("=", title)
        for line in lines:
            terminalreporter.write_line(line)
