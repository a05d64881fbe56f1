"""Commands of third parties, from a terminal's point of view: they work, they see no key, and a broken one is named."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import pytest_asyncio

from kernelm.testing.harness import System
from kernelm.testing.hooks import install
from kernelm_cli.confined import Order, confine
from kernelm_cli.home import UpFile, write_up
from kernelm_cli.hooks import GROUP
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.system import Empty, Kernel

pytestmark = pytest.mark.asyncio(loop_scope="module")
LOOKS = """
import os
@hookimpl
def run_command(arguments):
    for path in arguments:
        try:
            found = os.listdir(path) if os.path.isdir(path) else open(path).read()
            print("READ", path, found)
        except OSError as error:
            print("refused", path, error.strerror)
    print("environment", sorted(k for k in os.environ if k.startswith("KERNELM")))
    with open("written.txt", "w") as file:
        file.write("here")
    return 3
"""
CALLS = """
import asyncio
from kernelm_sdk.errors import Fault
from kernelm_sdk.system import Empty, Kernel, KeyRequest
@hookimpl
def run_command(arguments, connect):
    async def work():
        bus = await connect()
        print("user", bus.user)
        for call, request in ((Kernel.state, Empty()), (Kernel.create_key, KeyRequest("mine"))):
            try:
                await bus.call(call, request, timeout_s=5.0)
                print("ANSWERED", call.__name__)
            except Fault as fault:
                print("refused", call.__name__, fault.code)
        await bus.close()
    asyncio.run(work())
    return 0
"""
HOOKS = {"looks": LOOKS, "calls": CALLS, "raises": "@hookimpl\ndef run_command(): raise ValueError('my mistake')\n",
         "answers": "@hookimpl\ndef run_command(): return 'fine'\n", "imports": "import no_such_module_anywhere\n",
         "up": "raise RuntimeError('never imported')\n"}  # fmt: skip


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Desk(NamedTuple):
    system: System
    place: Path
    work: Path

    async def kernelm(self, *arguments: str, where: Path | None = None) -> Ended:
        environment = {"KERNELM_HOME": str(self.system.home), "KERNELM_KEY": "k", "PYTHONPATH": str(self.place), "COLUMNS": "2000"}
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kernelm_cli", *arguments, cwd=where or self.work, env=os.environ | environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)  # fmt: skip
        out, err = await asyncio.wait_for(child.communicate(), 120)
        return Ended(child.returncode or 0, out.decode(), err.decode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    place, work = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("work")
    for name, code in HOOKS.items():
        install(place, GROUP, name, code)
    async with System() as system:
        created = psutil.Process().create_time()
        write_up(system.home, UpFile(os.getpid(), created, system.broker.url, "", "", time.time()))
        yield Desk(system, place, work)


async def test_a_command_runs_where_the_user_is_and_reads_no_key(desk: Desk) -> None:
    home = desk.system.home
    secrets = [home, home / "admin.creds", home / "identity", home / "identity" / "account.seed", home / "run",
               Path("/proc/1/environ"), Path(f"/proc/{os.getpid()}/environ"), Path("/tmp")]  # fmt: skip
    ended = await desk.kernelm("looks", *map(str, secrets))
    assert ended.code == 3, ended.err
    assert "READ" not in ended.out
    assert ended.out.count("refused") == len(secrets)
    assert "environment []" in ended.out
    assert (desk.work / "written.txt").read_text() == "here"


async def test_its_connection_is_a_clients_and_ends_with_it(desk: Desk) -> None:
    ended = await desk.kernelm("calls")
    assert ended.code == 0, ended.err
    assert "refused state permission_denied" in ended.out
    assert "refused create_key permission_denied" in ended.out
    assert "ANSWERED" not in ended.out
    keys = (await desk.system.admin.call(Kernel.list_keys, Empty())).keys
    assert [(k.name, k.revoked) for k in keys] == [("command calls", True)]


@pytest.mark.parametrize(("name", "why"), [
    ("raises", "command 'raises' is broken: run_command raised ValueError: my mistake"),
    ("answers", "command 'answers' is broken: run_command answered 'fine', and not an exit code"),
    ("imports", "command 'imports' is broken: ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
])  # fmt: skip
async def test_a_broken_one_is_named_and_the_command_lives_on(desk: Desk, name: str, why: str) -> None:
    ended = await desk.kernelm(name)
    assert ended.code == 1
    assert why in ended.err
    assert "Traceback" not in ended.err
    assert (await desk.kernelm("plugin", "list")).code == 0


async def test_a_command_of_kernelms_own_is_not_replaced(desk: Desk) -> None:
    ended = await desk.kernelm("doctor")
    assert "command up" in ended.out
    assert "left out, of hooked-up: the name is taken" in ended.out
    helped = (await desk.kernelm("--help")).out
    assert "Of hooked-looks, a third party; it runs without your keys." in helped
    assert "hooked-up" not in helped


async def test_it_does_not_run_where_the_keys_are(desk: Desk) -> None:
    ended = await desk.kernelm("looks", where=desk.system.home)
    assert ended.code == 2
    assert "run it from another folder" in ended.err
    ended = await desk.kernelm("looks", where=desk.system.home.parent)
    assert ended.code == 2, "a folder that holds the home would open it"


async def test_nothing_runs_on_a_machine_that_can_not_confine_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "landlock", None)
    with pytest.raises(KernelFault, match="run confined, which this machine can't do"):
        confine(Order("looks", (), (), ()))
