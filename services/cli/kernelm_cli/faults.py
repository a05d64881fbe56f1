"""How a fault reaches the person at the terminal: what, where, remedy, in a red panel on stderr; and the exit code."""

import os
import sys
import traceback

from cyclopts import CycloptsError
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from kernelm_cli.tables import pairs
from kernelm_sdk.errors import ClientFault, Fault, FaultBody, from_body

USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes: bad input, failed, Ctrl-C (128 + SIGINT, as shells have it)


def panel(fault: Fault) -> Panel:
    """The fault as a panel: message, where (its details), the last lines of a log if it brings some, remedy."""
    rows = pairs()
    rows.add_row("what", Text(fault.message))
    details = {k: v for k, v in fault.details.items() if k != "log" and v not in ("", None)}
    if details:
        rows.add_row("where", Text(", ".join(f"{k} {v}" for k, v in details.items())))
    if fault.remedy:
        rows.add_row("remedy", Text(fault.remedy, style="green"))
    log = str(fault.details.get("log", "")).strip("\n")
    content = Group(rows, Text(), Text(log, style="dim", overflow="fold")) if log else rows
    return Panel(content, title=f"[bold red]{fault.code}[/]", title_align="left", border_style="red", expand=False)


def show(fault: Fault | FaultBody) -> None:
    """Print the fault on stderr."""
    fault = from_body(fault) if isinstance(fault, FaultBody) else fault
    console = Console(stderr=True)
    if not console.is_terminal:  # a log or a test: wide enough for a path in one line
        console = Console(stderr=True, width=160)
    console.print(panel(fault))


def of(error: BaseException) -> Fault:
    """Whatever was raised, as a fault."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, CycloptsError):
        return ClientFault("usage", str(error), "`kernelm --help`, or `kernelm COMMAND --help`")
    if isinstance(error, OSError) and error.filename:
        return Fault("os", f"{error.filename}: {error.strerror}", "check the path, its owner, and the free space of its disk")
    return Fault("internal", f"{type(error).__name__}: {error}", "a defect of kernelm: KERNELM_DEBUG=1 shows the traceback")


def exit_code(fault: Fault) -> int:
    """2 where the caller's input was at fault, 1 otherwise."""
    return USAGE if isinstance(fault, ClientFault) else FAILURE


def report(error: BaseException) -> int:
    """Print `error` and give the exit code; the traceback only with KERNELM_DEBUG=1."""
    if os.environ.get("KERNELM_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    fault = of(error)
    show(fault)
    return exit_code(fault)
