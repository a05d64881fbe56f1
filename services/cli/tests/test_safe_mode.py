"""A third party's plugin that takes the system down: `kernelm up` says so, and `kernelm up --safe` starts without it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kernelm_cli.home import read_up

pytestmark = pytest.mark.slow
MANIFEST = """name = "stranger"
version = "1"
summary = "ends the process that it is in"
contracts = ["stranger/1"]
entry = "strangerplugin.plugin:Stranger"
runtimes = ["{runtime}"]

[restart]
intensity = 1
"""
CONTRACT = """import json, os, pathlib, time
from typing import Any
import msgspec
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.plugin import Plugin

class Nothing(msgspec.Struct):
    pass

class Strange(Contract, name="stranger", major=1):
    @unary
    async def nothing(self, request: Nothing, call: Any) -> Nothing: ...

class Stranger(Plugin, Strange):
    async def on_start(self) -> None:
        {what}
"""
KILL_THE_NODE = 'os.kill(json.loads(pathlib.Path(os.environ["KERNELM_HOME"], "run/up.json").read_text())["children"]["node"], 9)'
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def install(site: Path, runtime: str, what: str) -> None:
    """What `pip install` leaves of a plugin: a package, and a distribution with the entry point."""
    package, distribution = site / "strangerplugin", site / "strangerplugin-1.dist-info"
    for folder in (package, distribution):
        folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "kernelm-plugin.toml").write_text(MANIFEST.format(runtime=runtime))
    (package / "plugin.py").write_text(CONTRACT.format(what=what))
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: strangerplugin\nVersion: 1\n")
    (distribution / "entry_points.txt").write_text("[kernelm.plugins]\nstranger = strangerplugin\n")


@pytest.fixture
def kernelm(tmp_path: Path) -> Command:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"KERNELM_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run([sys.executable, "-m", "kernelm_cli", *arguments], env=environment, capture_output=True, text=True,
                              check=False, timeout=300)  # fmt: skip

    return run


def test_a_strangers_plugin_that_breaks_the_start_and_safe_mode_gets_past_it(tmp_path: Path, kernelm: Command) -> None:
    install(tmp_path / "site", "process", KILL_THE_NODE)  # as one that uses up the machine's memory might
    broken = kernelm("up", "--detach")
    assert broken.returncode == 1, broken.stdout
    assert "node ended with SIGKILL" in broken.stderr, broken.stderr
    assert read_up(tmp_path / "home") is None  # nothing is left running
    safe = kernelm("up", "--detach", "--safe")  # the pool is kept in the broker from before, and is left out as well
    try:
        assert safe.returncode == 0, safe.stderr
        line = next(text for text in safe.stdout.splitlines() if "stranger" in text)
        assert "by --safe" in line
        shown = kernelm("ps")
        assert shown.returncode == 0, shown.stderr
        up = read_up(tmp_path / "home")
        assert up is not None
        assert psutil.pid_exists(up.children["node"])
        assert up.processes["node"].restarts == 0
    finally:
        assert kernelm("down").returncode == 0


def test_a_strangers_plugin_that_crashes_for_ever_is_quarantined_and_the_system_is_up(tmp_path: Path, kernelm: Command) -> None:
    install(tmp_path / "site", "process", "os._exit(7)")
    started = kernelm("up", "--detach")
    try:
        assert started.returncode == 0, started.stderr
        line = next(text for text in started.stdout.splitlines() if "stranger" in text)
        assert "quarantined" in line
        assert line.startswith("✗")
    finally:
        assert kernelm("down").returncode == 0


def test_a_strangers_plugin_that_never_gets_ready_does_not_hold_up_the_system(tmp_path: Path, kernelm: Command) -> None:
    install(tmp_path / "site", "process", "time.sleep(1e6)")
    started = kernelm("up", "--detach")
    try:
        assert started.returncode == 0, started.stderr
        line = next(text for text in started.stdout.splitlines() if "stranger" in text)
        assert "not ready after 20 s" in line
    finally:
        assert kernelm("down").returncode == 0
