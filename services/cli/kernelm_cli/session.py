"""What every command shares: the home, the connection as its administrator, and where output goes."""

import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.console import Console

from kernelm_authority.identity import admin
from kernelm_cli.home import UpFile, read_up
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.system import ArtifactFile

DEFAULT_HOME = Path("~/.kernelm")


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Options of every command."""

    home: Annotated[Path, Parameter(env_var="KERNELM_HOME", help="Where this system keeps its state.")] = DEFAULT_HOME

    @property
    def folder(self) -> Path:
        """The home as an absolute path."""
        return self.home.expanduser().absolute()


@Parameter(name="*")
@dataclass(frozen=True)
class Output(Common):
    """Options of every command that can also answer a program."""

    json: Annotated[bool, Parameter(negative="", help="Print JSON instead of tables.")] = False


def stdout() -> Console:
    """The console for results; wide where nobody looks, so that a pipe gets whole lines."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def running(home: Path) -> UpFile:
    """What the launcher wrote about the system that runs on `home`; KernelFault "not_running" if none does."""
    up = read_up(home)
    if up is None or not up.alive():
        raise KernelFault("not_running", f"nothing runs on {home}", f"kernelm up --detach --home {home}")
    return up


@asynccontextmanager
async def connection(home: Path) -> AsyncIterator[Bus]:
    """The bus as the administrator of `home`."""
    bus = await Bus.connect(running(home).url, admin(home))
    try:
        yield bus
    finally:
        await bus.close()


@contextmanager
def asking(name: str) -> Iterator[None]:
    """For calls of the deployment `name`: ClientFault "unknown_model" where nobody answers."""
    try:
        yield
    except KernelFault as fault:
        if fault.code != "no_responders":
            raise
        raise ClientFault("unknown_model", f"no deployment {name!r} answers", "kernelm model list") from None


def print_piece(text: str) -> None:
    """A piece of an answer, at once, without characters that would steer the terminal."""
    sys.stdout.write("".join(letter for letter in text if letter.isprintable() or letter in "\n\t"))
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """`value` (structs and containers of them) as indented JSON on stdout."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False) + "\n")


def megabytes(files: tuple[ArtifactFile, ...]) -> float:
    """Size of an artifact in 2**20 bytes."""
    return sum(f.bytes for f in files) / 2**20
