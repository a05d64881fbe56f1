"""A plugin in another language: its manifest's `command` in the runtime `process`, with real programs."""

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from kernelm.testing.parts import absent
from kernelm_node.diagnosis import diagnose, last_lines
from kernelm_node.runtimes.process import ProcessRuntime
from kernelm_node.runtimes.runtime import UNKNOWN_CODE, Exit, Launch
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import parse_manifest
from kernelm_sdk.system import Manifest

SCRIPT = '#!/bin/sh\necho "$KERNELM_INSTANCE $PWD $1 $(cat beside.txt)"\n'


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    source, scratch = tmp_path / "source", tmp_path / "scratch"
    source.mkdir()
    scratch.mkdir()
    (source / "beside.txt").write_text("stored")
    (source / "start").write_text(SCRIPT)
    for file in source.iterdir():
        file.chmod(0o444)  # as the artifact store leaves files
    environment = {**os.environ, "KERNELM_INSTANCE": "p-1", "KERNELM_MANIFEST": str(source / "kernelm-plugin.toml")}
    return Launch("p-1", "p", "p", environment, scratch, tmp_path / "p-1.log", with_command(), source=source)


def with_command(*command: str) -> Manifest:
    return Manifest("p", "1.0", "", (), "", command=command or ("sh", "start", "an argument"))


async def started(launch: Launch, *command: str) -> str:
    task = await ProcessRuntime(launch.scratch).start(msgspec.structs.replace(launch, manifest=with_command(*command)))
    assert await task.wait() == Exit(0)
    return launch.log.read_text()


async def test_it_runs_in_the_plugins_folder_with_its_arguments(launch: Launch) -> None:
    assert await started(launch, "sh", "start", "one") == f"p-1 {launch.source} one stored\n"


async def test_a_stored_file_is_run_though_it_has_no_permission_to_be(launch: Launch) -> None:
    assert await started(launch, "./start", "two") == f"p-1 {launch.source} two stored\n"


async def test_of_an_installed_plugin_it_runs_beside_the_manifest(launch: Launch) -> None:
    installed = msgspec.structs.replace(launch, source=None)
    assert await started(installed, "sh", "start", "three") == f"p-1 {launch.source} three stored\n"


@pytest.mark.parametrize(("command", "where"), [(("surely-no-program", "main.js"), "on the PATH of this node"),
                                                (("./absent",), "among its files")])  # fmt: skip
async def test_a_missing_program_is_named_with_a_remedy_also_by_diagnose(launch: Launch, command: tuple[str, ...],
                                                                         where: str) -> None:  # fmt: skip
    with pytest.raises(ClientFault) as caught:
        await ProcessRuntime(launch.scratch).start(msgspec.structs.replace(launch, manifest=with_command(*command)))
    assert caught.value.code == "no_program"
    assert command[0] in caught.value.message
    assert where in caught.value.message
    advice = diagnose(Exit(UNKNOWN_CODE, "it is not running"), last_lines(launch.log)).partition("\n")[0]
    assert command[0] in advice
    assert "-> " + caught.value.remedy in advice


@pytest.mark.parametrize(("program", "advice"), [
    ("import 'surely-not-there'", "npm package 'surely-not-there' is missing: `npm install`"),
    ("require('surely-not-there')", "npm package 'surely-not-there' is missing: `npm install`"),
    ("import '/nowhere/main.js'", "/nowhere/main.js is missing"),
])  # fmt: skip
def test_what_node_says_of_a_missing_package_becomes_advice(program: str, advice: str, tmp_path: Path) -> None:
    file = tmp_path / ("main.mjs" if program.startswith("import") else "main.cjs")
    file.write_text(program)
    try:
        crash = subprocess.run(["node", str(file)], capture_output=True, text=True)
    except FileNotFoundError:
        absent("needs Node.js (apt-get install nodejs npm)")
    assert advice in diagnose(Exit(1), crash.stderr.splitlines())


HEAD = 'name = "p"\nversion = "1"\nsummary = ""\ncontracts = ["data/1"]\n'


@pytest.mark.parametrize(("lines", "text"), [
    ("", "neither `entry` (module:Class, for Python) nor `command`"),
    ('entry = "m:C"\ncommand = ["node", "main.js"]', "both `entry` (module:Class, for Python) and `command`"),
    ("command = []", "neither"),
    ('command = "node main.js"', "Expected `array`"),
    ('command = [""]', "begins with a program"),
    ('command = ["node"]\nruntimes = ["venv", "process"]', '"process" alone'),
])  # fmt: skip
def test_a_manifest_has_exactly_one_of_entry_and_command(lines: str, text: str) -> None:
    with pytest.raises(ClientFault) as caught:
        parse_manifest(HEAD + lines, "p/kernelm-plugin.toml")
    assert caught.value.code == "invalid_manifest"
    assert caught.value.message.startswith("p/kernelm-plugin.toml: ")
    assert text in caught.value.message
    assert parse_manifest(HEAD + 'command = ["node", "main.js"]', "").command == ("node", "main.js")
