"""The runtime `venv`: environments built by real pip, and what becomes of a build that fails or is given up."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
from msgspec import structs

from kernelm.testing.harness import until
from kernelm_node.diagnosis import diagnose, last_lines
from kernelm_node.runtimes.pidfd import started_at
from kernelm_node.runtimes.runtime import Exit, Launch, Task
from kernelm_node.runtimes.venv import VenvRuntime
from kernelm_node.runtimes.venvs import Venvs, copied, requirements_of
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import Environment, Environments, Manifest

PROGRAM = "import six, sys; print('six', six.__version__, sys.prefix, flush=True)"


def launch(home: Path, name: str, dependencies: list[str]) -> Launch:
    """A plugin `name` whose entry module, imported by the real runner, says which `six` it has; then the runner fails
    for the lack of a broker."""
    source, scratch = home / "artifacts" / name, home / "scratch" / name
    for folder in (source, scratch, home / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    (source / f"{name}.py").write_text(PROGRAM)
    manifest = f'name = "{name}"\nversion = "1"\nsummary = ""\ncontracts = []\nentry = "{name}:P"\n'
    (source / "kernelm-plugin.toml").write_text(manifest)
    (source / "pyproject.toml").write_text(f'[project]\nname = "{name}"\nversion = "1"\ndependencies = {dependencies}\n')
    environment = {**os.environ, "KERNELM_INSTANCE": name, "KERNELM_PLUGIN": name, "KERNELM_POOL": name,
                   "KERNELM_SCRATCH": str(scratch), "KERNELM_MANIFEST": str(source / "kernelm-plugin.toml")}  # fmt: skip
    return Launch(name, name, name, environment, scratch, home / "logs" / f"{name}.log", Manifest(name, "1", "", (), f"{name}:P"),
                  source=source)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def runtime(home: Path, monkeypatch: pytest.MonkeyPatch) -> VenvRuntime:
    # the runner proper needs a broker: here the plugin's module is what the environment's Python runs
    monkeypatch.setattr("kernelm_node.runtimes.venv.RUNNER", ("-c", "import os; __import__(os.environ['KERNELM_PLUGIN']); import "
                                                                 "kernelm_sdk.runner, kernelm_contracts"))  # fmt: skip
    return VenvRuntime(home)


async def ended(task: Task) -> Exit:
    return await asyncio.wait_for(task.wait(), 240)


async def test_plugins_that_need_different_versions_run_side_by_side(home: Path, runtime: VenvRuntime) -> None:
    old, new = launch(home, "old", ["six==1.16.0"]), launch(home, "new", ["six>=1.17", "kernelm-sdk"])
    tasks = [await runtime.start(old), await runtime.start(new)]
    assert [t.pid for t in tasks] == [0, 0], "the start is answered at once, and pip works behind it"
    assert [(await ended(t)).code for t in tasks] == [0, 0], old.log.read_text() + new.log.read_text()
    said = [next(line for line in x.log.read_text().splitlines() if line.startswith("six ")).split() for x in (old, new)]
    assert said[0][1] == "1.16.0"
    assert said[1][1] != "1.16.0"
    prefixes = {Path(words[2]) for words in said}
    assert len(prefixes) == 2
    assert all(p.parent == home / "venvs" and (p / ".used").exists() for p in prefixes)
    assert not list((home / "venvs").glob("*.building-*"))


async def test_the_same_requirements_share_one_environment_built_once(home: Path, runtime: VenvRuntime) -> None:
    venvs = Venvs(home / "venvs")
    log = home / "shared.log"
    places = await asyncio.gather(*(venvs.get(["six==1.16.0"], log) for _ in range(3)))
    again = await Venvs(home / "venvs").get(["six==1.16.0"], log)
    assert {*places} == {again}
    assert not log.exists() or log.read_text().count("Successfully installed") <= 1
    scripts = [s.read_text() for s in (again / "bin").iterdir() if s.is_file() and not s.is_symlink() and s.suffix == ""]
    assert not any("building-" in text for text in scripts)


@pytest.mark.parametrize(("dependencies", "advice"), [
    (["six==1.16.0", "six==1.17.0"], "contradict"),
    (["surely-no-such-package==9.9"], "no package index"),
])  # fmt: skip
async def test_a_failed_build_leaves_nothing_and_says_why(home: Path, runtime: VenvRuntime, dependencies: list[str],
                                                         advice: str) -> None:  # fmt: skip
    before = {p.name for p in (home / "venvs").glob("*") if p.is_dir()}
    started = launch(home, "conflict", dependencies)
    exit = await ended(await runtime.start(started))
    assert (exit.code, exit.note) == (1, "it could not be prepared")
    assert {p.name for p in (home / "venvs").glob("*") if p.is_dir()} == before
    diagnosis = diagnose(exit, last_lines(started.log))
    assert advice in diagnosis.splitlines()[0], diagnosis
    assert "six" in diagnosis or "surely-no-such-package" in diagnosis


async def test_a_start_that_is_given_up_ends_pip_too(home: Path, runtime: VenvRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = home / "pip.pid"
    program = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr("kernelm_node.runtimes.venvs._commands", lambda *_: [[sys.executable, "-c", program]])
    task = await runtime.start(launch(home, "slow", ["six==1.15.0"]))
    waiting = asyncio.create_task(task.wait())
    await until(lambda: pid_file.exists() and pid_file.read_text(), 20, "the build under way")
    task.ask()
    assert (await asyncio.wait_for(waiting, 60)).code == -9
    assert not started_at(int(pid_file.read_text()))
    assert not list((home / "venvs").glob("*.building-*"))


async def test_requirements_are_the_plugins_own_without_the_sdk(tmp_path: Path) -> None:
    wanted = ["kernelm-sdk>=0.1", "six>=1.16", "colorama; sys_platform == 'win32'"]
    found = requirements_of("x", launch(tmp_path, "x", wanted).source)
    assert found == ["six>=1.16"]
    assert all(not r.startswith("kernelm") for r in requirements_of("trainer", None))
    with pytest.raises(ClientFault, match="six=>1"):
        requirements_of("x", launch(tmp_path, "x", ["six=>1"]).source)


async def test_an_extra_is_installed_and_what_it_does_without_is_taken_out_again(home: Path, runtime: VenvRuntime) -> None:
    """As vLLM's build for the CPU needs it: it requires torchvision, whose builds in the index fail to import beside it."""
    wanted = launch(home, "extra", [])
    assert wanted.source is not None
    with (wanted.source / "pyproject.toml").open("a") as file:
        file.write('[project.optional-dependencies]\ncpu = ["six", "toml"]\ngpu = ["nowhere"]\n')
    environments = Environments(Environment(("cpu",), ("toml",)), Environment(("gpu",)))
    wanted = structs.replace(wanted, manifest=structs.replace(wanted.manifest, venv=environments))
    assert (await ended(await runtime.start(wanted))).code == 0, wanted.log.read_text()
    assert not list(home.glob("venvs/*/lib/python*/site-packages/toml"))
    assert requirements_of("extra", wanted.source, ("gpu",)) == ["nowhere"]
    with pytest.raises(ClientFault, match="no extra 'tpu'"):
        requirements_of("extra", wanted.source, ("tpu",))
    assert any(r.startswith("spacy") for r in requirements_of("data", None, ("names",)))
    with pytest.raises(ClientFault, match="no extra 'tpu'"):
        requirements_of("data", None, ("tpu",))


async def test_a_python_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelm_node.runtimes.venvs._commands", lambda *_: [["/nowhere/python", "-m", "venv"]])
    with pytest.raises(KernelFault, match="/nowhere/python"):
        await Venvs(tmp_path).get([], tmp_path / "log")


def test_an_installed_plugin_is_copied_without_its_neighbours(tmp_path: Path) -> None:
    package = tmp_path / "site" / "kernelm_p"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "site" / "neighbour.py").write_text("")
    place = copied(package, tmp_path / "plugins")
    assert place == copied(package, tmp_path / "plugins")
    assert [p.name for p in place.iterdir()] == ["kernelm_p"]
    (package / "__init__.py").write_text("changed = 1")
    assert copied(package, tmp_path / "plugins") != place
