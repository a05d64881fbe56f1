"""The table of the mutation set."""

import pytest


@pytest.fixture(scope="session")
def table(tables: dict[str, list[str]]) -> list[str]:
    """Lines for the end of the run."""
    return tables["broken plugins, and what caught them"]
