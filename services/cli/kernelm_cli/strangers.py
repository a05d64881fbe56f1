"""Commands of third parties: which there are, and running one without the keys of the home.

They are found by what is installed, and none of their code is imported here: this process may connect as the administrator. One
runs in a process of its own, confined (confined.py), with an environment that says nothing of the home. If it asks for a connection
it gets a key for calling models, which is revoked when it ends.
"""

import asyncio
import os
import shutil
import site
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from kernelm_authority.identity import read
from kernelm_cli.confined import Asked, Given, Order
from kernelm_cli.hooks import GROUP
from kernelm_cli.session import DEFAULT_HOME, connection, running
from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import TOKEN
from kernelm_sdk.errors import ClientFault, Fault, from_body
from kernelm_sdk.system import Kernel, KeyCreated, KeyName, KeyRequest

KEPT = ("PATH", "PYTHONPATH", "LANG", "TERM", "COLUMNS", "LINES", "NO_COLOR", "TZ")  # of the environment
READ = ("/usr", "/lib", "/lib64", "/bin", "/dev/urandom", "/proc/meminfo", "/proc/cpuinfo", "/sys/devices/system/cpu",
        *(f"/etc/{n}" for n in ("hosts", "ld.so.cache", "localtime", "nsswitch.conf", "passwd", "resolv.conf", "ssl")))  # fmt: skip
DEVICES = ("/dev/null", "/dev/tty")
KEY_S = 24 * 3600  # at most, should this process be killed before it can revoke it


def add(app: App, taken: set[str]) -> dict[str, str]:
    """Add them to the command; those that are left out, with the reason: a name of kernelm's own can't be taken."""
    left_out: dict[str, str] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        whose = point.dist.name if point.dist else "an unknown distribution"
        if point.name in taken or not TOKEN.match(point.name):
            left_out[point.name] = f"of {whose}: " + ("the name is taken" if point.name in taken else "no name for a command")
            continue
        taken.add(point.name)
        app.command(_runner(point), name=point.name, help=f"Of {whose}, a third party; it runs without your keys.",
                    help_flags=[], version_flags=[])  # fmt: skip
    return left_out


def _runner(point: EntryPoint) -> Callable[..., int]:
    def command(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
        home = Path(os.environ.get("KERNELM_HOME") or DEFAULT_HOME).expanduser().absolute()
        return asyncio.run(run(point.name, arguments, home))

    return command


async def run(name: str, arguments: tuple[str, ...], home: Path) -> int:
    """Run the command; its exit code. The fault if it is broken or can't be confined."""
    ours, theirs = socket.socketpair()
    scratch = tempfile.mkdtemp(prefix="kernelm-command-")
    try:
        with ours, theirs:
            order = Order(name, arguments, _readable(home), _writable(home, scratch))
            environment = {k: v for k, v in os.environ.items() if k in KEPT or k.startswith("LC_")}
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "kernelm_cli.confined", str(theirs.fileno()), pass_fds=[theirs.fileno()],
                env=environment | {"HOME": scratch, "TMPDIR": scratch, "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
            theirs.close()
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            writer.write(msgspec.json.encode(order) + b"\n")
            fault = await _serve(name, home, reader, writer)
            code = await process.wait()
            writer.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if fault is not None:
        raise fault
    return code if code >= 0 else 128 - code


async def _serve(name: str, home: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Fault | None:
    """Answer until it ends; the fault that it ended with, if it did."""
    keys: list[str] = []
    try:
        while line := await reader.readline():
            asked = msgspec.json.decode(line, type=Asked)
            if asked.fault is not None:
                return from_body(asked.fault)
            writer.write(msgspec.json.encode(await _grant(name, home, asked.connect, keys)) + b"\n")
    finally:
        if keys:
            async with connection(home) as bus:
                for key in keys:
                    await bus.call(Kernel.revoke_key, KeyName(key))
    return None


async def _grant(name: str, home: Path, public: str, keys: list[str]) -> Given:
    """What a client's key for the holder of `public` connects with."""
    try:
        async with connection(home) as bus:
            made = await _key(bus, name, public)
            keys.append(made.key.id)
            return Given(running(home).url, read(made.jwt)["name"], made.jwt)
    except Fault as fault:
        return Given(fault=fault.body())


async def _key(bus: Bus, name: str, public: str) -> KeyCreated:
    made: KeyCreated = await bus.call(Kernel.create_key, KeyRequest(f"command {name}", expires_s=KEY_S, public_key=public))
    return made


def _readable(home: Path) -> tuple[str, ...]:
    """Python, its packages, and what every program reads. ClientFault if one of these holds the home."""
    python = [sys.prefix, sys.base_prefix, sys.executable, *site.getsitepackages(), *sysconfig.get_paths().values(), *sys.path]
    found = {str(Path(p).resolve()) for p in (*READ, *python) if p and Path(p).exists()}
    return tuple(sorted(_without(home, p) for p in found))


def _writable(home: Path, scratch: str) -> tuple[str, ...]:
    """The folder that the user is in, and the scratch folder."""
    return (_without(home, str(Path.cwd().resolve())), scratch, *(d for d in DEVICES if Path(d).exists()))


def _without(home: Path, path: str) -> str:
    real = home.resolve()
    if real.is_relative_to(path) or Path(path).is_relative_to(real):
        what = f"a third party's command would be able to read {path}, which holds {home} with its keys, or lies in it"
        raise ClientFault("permission_denied", what, "run it from another folder")
    return path
