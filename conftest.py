"""How `make test` spreads over processes: by folder, so that what a folder's tests share is made once."""

from pathlib import PurePosixPath
from typing import Any

from xdist.scheduler import LoadScopeScheduling

ALONE = "tests/"  # the files of these folders share nothing that takes long


class ByFolder(LoadScopeScheduling):
    """pytest-xdist's scheduling by scope, a scope being `plugins/trainer` or `tests/integration/test_swap.py`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return file if file.startswith(ALONE) else "/".join(PurePosixPath(file).parts[:2])


def pytest_xdist_make_scheduler(config: Any, log: Any) -> ByFolder:
    """Hook of pytest-xdist."""
    return ByFolder(config, log)
