"""The `kernelm` command: its groups, and how every failure ends (a panel, an exit code, no traceback)."""

import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version

from cyclopts import App
from rich.console import Console

from kernelm_cli import data, doctor, faults, identity, jobs, keys, models, plugins, state, strangers, up
from kernelm_cli.call import call
from kernelm_cli.checking import check
from kernelm_cli.dev import dev
from kernelm_cli.packing import keygen, pack
from kernelm_cli.run import run
from kernelm_cli.scaffold import new
from kernelm_cli.simulate import simulate

app = App(
    name="kernelm", help="A microkernel operating system for language models.", version=lambda: version("kernelm-cli"),
    help_epilogue="KERNELM_HOME: the home. KERNELM_KEY: the API key. KERNELM_DEBUG=1: tracebacks.",
    error_console=Console(stderr=True),
)  # fmt: skip
for command in (up.up, up.down, run, state.ps, state.events, call, doctor.doctor, simulate):
    app.command(command)
plugins.app.command(new)
plugins.app.command(check)
plugins.app.command(keygen)
plugins.app.command(pack)
plugins.app.command(dev)  # not there, since it builds upon the others
for group in (jobs.app, plugins.app, models.app, data.app, keys.app, identity.app):
    app.command(group)
doctor.COMMANDS.update(strangers.add(app, set(app)))


def execute(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code: 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C."""
    logging.getLogger("kernelm").addHandler(logging.NullHandler())  # the bus's warnings would run through the drawing
    try:
        result = app(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except KeyboardInterrupt:
        return faults.INTERRUPTED
    except BrokenPipeError:  # `kernelm events | head`: nobody reads on
        sys.stdout = None  # type: ignore[assignment] # or the interpreter complains when it flushes at exit
        return 0
    except Exception as error:
        return faults.report(error)
    return result if isinstance(result, int) else 0


def main() -> None:
    """The console script."""
    sys.exit(execute(sys.argv[1:]))
