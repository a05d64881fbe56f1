"""`kernelm up` and `kernelm down`."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import psutil
from cyclopts import Parameter
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from kernelm_cli import faults
from kernelm_cli.child import describe_exit
from kernelm_cli.home import UpFile, end, find_process, last_lines, leftovers, open_log, read_up
from kernelm_cli.launcher import Launcher, Options, Tell
from kernelm_cli.session import Common, stdout
from kernelm_cli.tables import pairs
from kernelm_sdk.errors import ClientFault, FaultBody, KernelFault, from_body

DOWN_S = 90.0
MARKS = {"ready": ("✓", "green"), "broken": ("✗", "red"), "left out": ("-", "yellow")}


class Message(msgspec.Struct, omit_defaults=True):
    """One line from a detached launcher to the command that started it."""

    name: str = ""
    state: str = ""
    detail: str = ""
    up: UpFile | None = None  # everything is ready
    fault: FaultBody | None = None  # it gave up


class Steps:
    """Shows each step of the start: a spinner for what is awaited, a line for what is there."""

    def __init__(self, console: Console) -> None:
        self._console, self._begun = console, time.monotonic()
        self._waiting: list[str] = []
        self._status = console.status("starting")

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Draw the spinner inside."""
        with self._status if self._console.is_terminal else contextlib.nullcontext():
            yield

    def tell(self, name: str, state: str, detail: str) -> None:
        """Take a step's news."""
        if state == "starting":
            self._waiting.append(name)
        elif state in MARKS:
            self._waiting = [n for n in self._waiting if n != name]
            mark, style = MARKS[state]
            took = f"{time.monotonic() - self._begun:5.1f} s"
            self._console.print(Text.assemble((f"{mark} ", style), f"{name:<12}", (took, "dim"), "  ", (detail, "dim")))
        self._status.update(f"waiting for {', '.join(self._waiting) or 'plugins'}" if state != "stopping" else f"stopping {name}")


def up(*, common: Common = Common(), detach: Annotated[bool, Parameter(negative="")] = False, http_port: int = 0,
       grpc_port: int = 0, broker_port: int = 0, safe: Annotated[bool, Parameter(negative="")] = False) -> int:  # fmt: skip
    """Start the whole system on this machine: broker, kernel, services, plugins.

    Parameters
    ----------
    detach
        Run in the background, and return once everything is ready.
    http_port
        Of the HTTP gateway; 0 for a free one.
    grpc_port
        Of the gRPC gateway; 0 for a free one.
    broker_port
        Of the NATS broker; 0 for a free one.
    safe
        Start without plugins of third parties.
    """
    options = Options(http_port, grpc_port, broker_port, safe)
    if trust := os.environ.get("KERNELM_TRUST"):  # of the node, which runs in another folder
        os.environ["KERNELM_TRUST"] = str(Path(trust).expanduser().absolute())
    if detach:
        return _detach(common.folder, options)
    _log()
    return asyncio.run(_in_foreground(common.folder, options))


def _log() -> None:
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)


async def _in_foreground(home: Path, options: Options) -> int:
    console = stdout()
    steps = Steps(console)

    def ready(up: UpFile) -> None:
        console.print(summary(home, up, "Ctrl-C"))

    with steps.shown():
        started = await _launch(home, options, steps.tell, ready)
    return 0 if started else faults.INTERRUPTED


async def _in_background(home: Path, options: Options, descriptor: int) -> int:
    with open(descriptor, "wb", buffering=0) as pipe:

        def say(message: Message) -> None:
            with contextlib.suppress(BrokenPipeError):  # the command in front was ended: the launcher goes on
                pipe.write(msgspec.json.encode(message) + b"\n")

        def ready(up: UpFile) -> None:
            say(Message(up=up))
            pipe.close()

        def tell(name: str, state: str, detail: str) -> None:
            if not pipe.closed:
                say(Message(name, state, detail))

        try:
            await _launch(home, options, tell, ready)
        except Exception as error:
            fault = faults.of(error)
            logging.getLogger("kernelm.launcher").error("%s", fault)
            if pipe.closed:
                raise
            say(Message(fault=fault.body()))
            return faults.exit_code(fault)
    return 0


async def _launch(home: Path, options: Options, tell: Tell, ready: Callable[[UpFile], None]) -> bool:
    """Run the system until SIGTERM or SIGINT; whether it was ready before that."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    launcher = Launcher(home, options, tell)

    async def live() -> None:
        ready(await launcher.up())
        await launcher.serve()

    life, asked = asyncio.create_task(live()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([life, asked], return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            await life  # raises what ended it
        return launcher.is_ready
    finally:
        life.cancel()
        asked.cancel()
        await launcher.down()


def _detach(home: Path, options: Options) -> int:
    """Start the launcher as a daemon, and relay what it says until it is ready or gives up. It is a fork, since all that it
    needs is imported here already, and importing it again would be a good part of a start."""
    console = stdout()
    output = open_log(home, "launcher")
    begun = os.fstat(output).st_size
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    launcher = os.fork()
    if launcher == 0:
        os.close(reader)
        _daemon(home, options, writer, output)
    os.close(writer)
    os.close(output)
    steps = Steps(console)
    with open(reader, "rb") as pipe, steps.shown():  # noqa: PTH123 - a pipe
        for line in pipe:
            message = msgspec.json.decode(line, type=Message)
            if message.fault is not None:
                os.waitpid(launcher, 0)  # it cleans up: what comes next finds the home free
                raise from_body(message.fault)
            if message.up is not None:
                console.print(summary(home, message.up, f"kernelm down{_home_option(home)}"))
                return 0
            steps.tell(message.name, message.state, message.detail)
    code = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
    raise KernelFault("launcher_failed", f"the launcher ended with {describe_exit(code)} before the system was ready",
                      f"read {home / 'logs' / 'launcher.log'}", log=last_lines(home, "launcher", begun))  # fmt: skip


def _daemon(home: Path, options: Options, writer: int, output: int) -> NoReturn:
    """The rest of a forked launcher's life: in a session of its own, with its log for a terminal."""
    code = 1
    try:
        os.setsid()
        os.chdir("/")
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        _log()
        code = asyncio.run(_in_background(home, options, writer))
    except BaseException:
        logging.getLogger("kernelm.launcher").exception("the launcher failed")
    finally:
        os._exit(code)  # what the parent has still to do at its end is not ours


def _home_option(home: Path) -> str:
    return "" if os.environ.get("KERNELM_HOME") or home == Common().folder else f" --home {home}"


def summary(home: Path, up: UpFile, stop: str) -> Panel:
    """Where everything is, and what to do next."""
    rows = pairs()
    option = _home_option(home)
    for name, value in (("HTTP", up.http), ("gRPC", up.grpc), ("NATS", up.url), ("home", str(home)),
                        ("logs", f"kernelm logs{option} --follow"), ("try", f"kernelm run{option} deploy/runs/news.toml"),
                        ("stop", stop)):  # fmt: skip
        rows.add_row(name, value)
    return Panel(rows, title="[bold green]kernelm is up[/]", title_align="left", border_style="green", expand=False)


def down(*, common: Common = Common()) -> int:
    """Stop the system of this home, in the reverse order of its start."""
    home, console = common.folder, stdout()
    running = read_up(home)
    if running and not running.pid:
        raise ClientFault("deployed", f"{home} is run by an engine, as containers", "docker compose down")
    launcher = find_process(running.pid, running.created) if running else None
    if launcher is None:
        remains = leftovers(home)
        end(remains)
        console.print(f"nothing runs on {home}" + (f"; ended {len(remains)} left over" if remains else ""))
        return 0
    launcher.terminate()
    with console.status("stopping") if console.is_terminal else contextlib.nullcontext():
        try:
            launcher.wait(DOWN_S)
        except psutil.TimeoutExpired:
            end([launcher], 0.0)
            end(leftovers(home))
            raise KernelFault("not_stopped", f"the launcher (pid {launcher.pid}) did not stop within {DOWN_S:g} s and was killed",
                              f"read {home / 'logs' / 'launcher.log'}") from None  # fmt: skip
    console.print(f"stopped what ran on {home}")
    return 0
