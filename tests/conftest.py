"""Tables that tests fill, printed at the end of the run whatever became of it."""

from collections import defaultdict
from typing import Any

import pytest

TABLES = pytest.StashKey[defaultdict[str, list[str]]]()


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> defaultdict[str, list[str]]:
    """Title to lines."""
    return _tables(pytestconfig)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist hands its tables to the one that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tables"] = dict(_tables(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the tables of a process that ended."""
    for title, lines in getattr(node, "workeroutput", {}).get("tables", {}).items():
        _tables(node.config)[title].extend(lines)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print them."""
    for title, lines in _tables(config).items():
        terminalreporter.write_sep("=", title)
        for line in lines:
            terminalreporter.write_line(line)


def _tables(config: pytest.Config) -> defaultdict[str, list[str]]:
    return config.stash.setdefault(TABLES, defaultdict(list))
