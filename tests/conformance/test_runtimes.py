"""`kernelm plugin check --runtime`: the kit in each of the node's runtimes, and what it says of those that can't be had."""

import asyncio
import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException

from kernelm.testing.conformance import Report, check_in
from kernelm.testing.conformance.places import IMAGE
from kernelm.testing.parts import absent
from kernelm_cli import staging
from kernelm_cli.app import execute
from kernelm_cli.scaffold import create

ROOT = Path(__file__).resolve().parents[2]


def stage(folder: Path, into: Path) -> None:
    staging.stage(staging.find(folder), into)


def checked(runtime: str, folder: Path, chaos: bool = False) -> Report:
    (report,) = asyncio.run(check_in((runtime,), folder, stage, chaos))
    return report


def assert_good(report: Report, runtime: str) -> None:
    failed = [(r.check, r.message, r.exchange) for r in report.results if r.status == "failed"]
    assert (report.runtime, failed) == (runtime, [])
    passed = {r.check for r in report.results if r.status == "passed"}
    assert {"handshake.starts", "calls.valid", "scheduler.room", "life.drain", "life.stop", "life.sigterm"} <= passed


@pytest.fixture
def scheduler(tmp_path: Path) -> Path:
    create("scheduler", "my-scheduler", tmp_path / "my-scheduler")
    return tmp_path / "my-scheduler"


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The runner image of this checkout, which the node's setting names meanwhile. Without Docker: skipped, in CI failed."""
    try:
        docker.from_env(timeout=60).close()
    except DockerException as error:
        absent(f"no Docker engine: {error}")
    built = subprocess.run([ROOT / "deploy/images/docker.sh", "runner"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    was = os.environ.get(IMAGE)
    os.environ[IMAGE] = built.stdout.strip()
    yield built.stdout.strip()
    os.environ.pop(IMAGE) if was is None else os.environ.update({IMAGE: was})


def test_in_a_process_forked_by_the_node(scheduler: Path) -> None:
    (scheduler / "tests" / "left_behind.py").write_text("raise RuntimeError('not a part of the plugin')\n")
    assert_good(checked("process", scheduler), "process")


@pytest.mark.slow
def test_in_an_environment_of_its_own(scheduler: Path) -> None:
    """Which has what its pyproject.toml names, and nothing else: what it only has by chance is found out."""
    report = checked("venv", scheduler)
    assert_good(report, "venv")
    file = scheduler / "my_scheduler" / "plugin.py"
    file.write_text(f"import rich\n{file.read_text()}")
    starts = next(r for r in checked("venv", scheduler).results if r.check == "handshake.starts")
    assert starts.status == "failed"
    assert "No module named 'rich'" in starts.exchange


@pytest.mark.slow
def test_in_a_container_with_chaos(scheduler: Path, image: str) -> None:
    report = checked("container", scheduler, chaos=True)
    assert_good(report, "container")
    passed = {r.check for r in report.results if r.status == "passed"}
    assert passed >= {"chaos.pause", "chaos.broker", "chaos.kill", "chaos.given-up"}


def test_in_the_nodes_own_process(scheduler: Path) -> None:
    """Only what is installed and kernelm's own; a stranger's plugin is skipped, whatever its manifest says."""
    assert_good(checked("inproc", ROOT / "plugins/scheduler"), "inproc")
    manifest = scheduler / "my_scheduler" / "kernelm-plugin.toml"
    manifest.write_text(manifest.read_text().replace('["process",', '["process", "inproc",'))
    (only,) = checked("inproc", scheduler).results
    assert (only.check, only.status) == ("runtime.usable", "skipped")
    assert "may not run in the node's process" in only.message


def test_what_can_not_be_had_is_told_in_every_output(
    scheduler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-engine.sock")
    monkeypatch.setenv(IMAGE, "sha256:" + "0" * 64)
    check = ["plugin", "check", str(scheduler), "--runtime", "process", "--runtime", "container", "--runtime", "inproc"]
    assert execute([*check, "--json", "--junit", str(tmp_path / "junit.xml")]) == 0
    reports = {r["runtime"]: r for r in json.loads(capsys.readouterr().out)}
    assert reports["process"]["passed"]
    (skipped,) = reports["container"]["results"]
    assert skipped["status"] == "skipped"
    assert "no Docker engine answers" in skipped["message"]
    suites = {s.get("name"): s for s in ElementTree.parse(tmp_path / "junit.xml").getroot()}
    assert set(suites) == {"my-scheduler.process", "my-scheduler.container", "my-scheduler.inproc"}
    node = suites["my-scheduler.container"].find("testcase/skipped")
    assert node is not None
    assert node.get("message") == skipped["message"]
    assert execute([*check[:3], "--runtime", "inproc"]) == 1, "nothing was checked"
    assert "its manifest does not name it" in " ".join(capsys.readouterr().out.split())
