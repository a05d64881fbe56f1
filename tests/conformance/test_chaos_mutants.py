"""The checks of `--chaos`: a good plugin passes all of them, and each broken one is caught by the one that is about its defect."""

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from kernelm.testing.conformance import Stand, check_on, checks_for, read
from kernelm.testing.conformance.results import Report
from kernelm.testing.parts import absent
from kernelm_cli.scaffold import create


def _beside(name: str) -> ModuleType:
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEAD, MUTANTS = _beside("mutants").HEAD, _beside("chaos_mutants").MUTANTS
GOOD = (("good data", "data", ""), ("good server", "server", ""))
AT_A_TIME = 3
NEEDS_ROOT = "chaos.storage-full"  # a small disk is mounted


def write(folder: Path, kind: str, defect: str = "") -> Path:
    create(kind, f"my-{kind}", folder)
    if defect:
        file = next(folder.glob("*/plugin.py"))
        file.write_text(f"{file.read_text()}{HEAD}{defect}\n")
    return folder


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, table: list[str]) -> dict[str, Report]:
    """A few at a time, each on a stand of its own; what came of each is printed at the end of the run."""

    async def check_all() -> dict[str, Report]:
        places = asyncio.Semaphore(AT_A_TIME)

        async def one(name: str, kind: str, defect: str) -> tuple[str, Report]:
            async with places:
                folder = write(tmp_path_factory.mktemp("plugin"), kind, defect)
                async with Stand() as stand:
                    return name, await check_on(stand, read(folder), with_chaos=True)

        return dict(await asyncio.gather(*(one(*each) for each in [*MUTANTS, *GOOD])))

    found = asyncio.run(check_all())
    table += [f"{check:26} {kind:12} {', '.join(found[check].failed) or 'nothing':36} {found[check].took_s:4.1f} s"
              for check, kind, _ in MUTANTS]  # fmt: skip
    return found


def skip_without_root(report: Report) -> None:
    """A user may not mount a disk; CI can."""
    skipped = [r.message for r in report.results if r.check == NEEDS_ROOT and r.status == "skipped"]
    if skipped:
        absent(skipped[0])


@pytest.mark.slow
def test_good_plugins_pass_all_of_them(reports: dict[str, Report]) -> None:
    made = set[str]()
    for report in (reports[name] for name, *_ in GOOD):
        assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]
        made |= {r.check for r in report.results if r.check.startswith("chaos.") and r.status == "passed"}
    assert made >= {name for name, *_ in MUTANTS} - {NEEDS_ROOT}
    skip_without_root(reports["good data"])


@pytest.mark.slow
@pytest.mark.parametrize("check", [m[0] for m in MUTANTS])
def test_a_defect_is_caught_by_the_check_for_it_alone(check: str, reports: dict[str, Report]) -> None:
    if check == NEEDS_ROOT:
        skip_without_root(reports["good data"])
    found = [(r.check, r.message, r.exchange) for r in reports[check].results if r.status == "failed"]
    assert [name for name, *_ in found] == [check], found


def test_every_check_has_its_broken_plugin(tmp_path: Path) -> None:
    names = {c.name for c in checks_for(read(write(tmp_path / "data", "data")), with_chaos=True) if c.name.startswith("chaos.")}
    assert names == {m[0] for m in MUTANTS}
