"""The kit, tried on itself: good plugins pass, and each broken one is caught by the one check that is about its defect."""

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

from kernelm.testing.conformance import Stand, check_on, checks_for, read
from kernelm.testing.conformance.results import Report
from kernelm_cli.scaffold import KINDS, create

_spec = importlib.util.spec_from_file_location("mutants", Path(__file__).with_name("mutants.py"))
assert _spec is not None
assert _spec.loader is not None
mutants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutants)
AT_A_TIME = 4
GOOD = ("scheduler", "server", "data", "trainer", "optimizer/1")


def write(folder: Path, kind: str, defect: str = "") -> Path:
    create(kind, f"my-{kind.partition('/')[0]}", folder)
    file = next(folder.glob("*/plugin.py"))
    if defect.startswith("conformance.toml:"):
        (folder / "conformance.toml").write_text(defect.partition(":")[2])
    elif defect:
        file.write_text(file.read_text() + mutants.HEAD + defect + "\n")
    return folder


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """All of them on one stand, a few at a time."""

    async def check_all() -> dict[str, Report]:
        todo = [("good " + kind, kind, "") for kind in GOOD] + list(mutants.MUTANTS)
        places = asyncio.Semaphore(AT_A_TIME)

        async def one(name: str, kind: str, defect: str) -> tuple[str, Report]:
            async with places:
                folder = write(tmp_path_factory.mktemp("plugin"), kind, defect)
                return name, await check_on(stand, read(folder))

        async with Stand() as stand:
            return dict(await asyncio.gather(*(one(*each) for each in todo)))

    return asyncio.run(check_all())


@pytest.mark.parametrize("kind", GOOD)
def test_what_new_writes_passes_every_check(kind: str, reports: dict[str, Report]) -> None:
    report = reports[f"good {kind}"]
    assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]


@pytest.mark.parametrize("check", [m[0] for m in mutants.MUTANTS])
def test_a_defect_is_caught_by_the_check_for_it_alone(check: str, reports: dict[str, Report]) -> None:
    found = [(r.check, r.message, r.exchange) for r in reports[check].results if r.status == "failed"]
    assert [name for name, *_ in found] == [check], found


def test_every_check_has_its_broken_plugin(tmp_path: Path) -> None:
    names = {"handshake.starts"}
    for kind in (k for k in KINDS if k != "trainer"):
        names |= {c.name for c in checks_for(read(write(tmp_path / kind, kind)))}
    assert names == {m[0] for m in mutants.MUTANTS}


def test_the_table_is_printed(reports: dict[str, Report], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write("\n")
        for check, kind, _ in mutants.MUTANTS:
            sys.stdout.write(
                f"  {check:26} {kind:10} caught by {', '.join(reports[check].failed) or 'nothing'}  {reports[check].took_s:.1f} s\n"
            )
