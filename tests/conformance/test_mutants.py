"""The kit, tried on itself: good plugins pass, and each broken one is caught by the one check that is about its defect."""

import asyncio
import importlib.util
import re
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
GOOD = (*KINDS, "jobs/1")  # a template for each kind, and what is written for a contract without one


def write(folder: Path, kind: str, defect: str = "") -> Path:
    create(kind, f"my-{kind.partition('/')[0]}", folder)
    file = next(folder.glob("*/plugin.py"))
    if defect.startswith("conformance.toml:"):
        (folder / "conformance.toml").write_text(defect.partition(":")[2])
    elif defect:
        if granted := re.search(r"TYPE = '([a-z.]+)'", defect):  # or the broker alone would keep it from being heard
            manifest = next(folder.glob("*/kernelm-plugin.toml"))
            manifest.write_text(manifest.read_text() + f'events = ["{granted[1]}"]\n')
        file.write_text(file.read_text() + mutants.HEAD + defect + "\n")
    return folder


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, table: list[str]) -> dict[str, Report]:
    """All of them on one stand, a few at a time; what came of each is printed at the end of the run."""

    async def check_all() -> dict[str, Report]:
        good = [("good " + kind, kind, "") for kind in GOOD] + [("good generator", "server", mutants.GENERATOR)]
        todo = good + list(mutants.MUTANTS)
        places = asyncio.Semaphore(AT_A_TIME)

        async def one(name: str, kind: str, defect: str) -> tuple[str, Report]:
            async with places:
                folder = write(tmp_path_factory.mktemp("plugin"), kind, defect)
                return name, await check_on(stand, read(folder))

        async with Stand() as stand:
            return dict(await asyncio.gather(*(one(*each) for each in todo)))

    found = asyncio.run(check_all())
    table.append(f"{'defect in':26} {'a good':12} {'is caught by':36} after")
    rows = [(check, kind, found[check]) for check, kind, _ in mutants.MUTANTS] + [("none", k, found[f"good {k}"]) for k in GOOD]
    table += [f"{check:26} {kind:12} {', '.join(r.failed) or 'nothing':36} {r.took_s:4.1f} s" for check, kind, r in rows]
    return found


@pytest.mark.parametrize("kind", GOOD)
def test_what_new_writes_passes_every_check(kind: str, reports: dict[str, Report]) -> None:
    report = reports[f"good {kind}"]
    assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]


def test_a_server_that_generates_text_passes_and_is_asked_all_of_it(reports: dict[str, Report]) -> None:
    report = reports["good generator"]
    assert report.good, [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]
    skipped = {r.check for r in report.results if r.status == "skipped"}
    assert not {name for name in skipped if name.startswith("server.")} - {"server.embeddings"}


@pytest.mark.parametrize("check", [m[0] for m in mutants.MUTANTS])
def test_a_defect_is_caught_by_the_check_for_it_alone(check: str, reports: dict[str, Report]) -> None:
    found = [(r.check, r.message, r.exchange) for r in reports[check].results if r.status == "failed"]
    assert [name for name, *_ in found] == [check], found


def test_every_check_has_its_broken_plugin(tmp_path: Path) -> None:
    names = {"handshake.starts"}
    for kind in KINDS:
        names |= {c.name for c in checks_for(read(write(tmp_path / kind, kind)))}
    assert names == {m[0] for m in mutants.MUTANTS}
