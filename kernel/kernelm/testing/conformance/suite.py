"""The kit as tests, one a check: subclass `ConformanceSuite` and say where the plugin is."""

import asyncio
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kernelm.testing.conformance import check_plugin, checks_for, read
from kernelm.testing.conformance.results import Report


class ConformanceSuite:
    """`PATH` is the plugin's folder; `CHAOS` adds what is killed and frozen; `COMMAND` starts a plugin of another language."""

    PATH: ClassVar[Path]
    CHAOS: ClassVar[bool] = False
    COMMAND: ClassVar[tuple[str, ...]] = ()

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test a check."""
        if "check" in metafunc.fixturenames:
            names = [c.name for c in checks_for(read(self.PATH, self.COMMAND), self.CHAOS)]
            metafunc.parametrize("check", ["handshake.starts", *names])

    @pytest.fixture(scope="class")
    def report(self) -> Report:
        """All checks are made once, on one stand."""
        return asyncio.run(check_plugin(self.PATH, self.CHAOS, self.COMMAND))

    def test_conforms(self, report: Report, check: str) -> None:
        """The rule of this check holds."""
        result = next(r for r in report.results if r.check == check)
        if result.status == "skipped":
            pytest.skip(result.message)
        assert result.status == "passed", f"{result.rule}\n{result.message}\n{result.exchange}\nremedy: {result.remedy}"
