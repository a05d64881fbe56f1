"""The `kernelm` command: its groups, and how every failure ends (a panel, an exit code, no traceback)."""

import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version

from cyclopts import App
from rich.console import Console

from kernelm_cli import artifacts, data, deploy, doctor, faults, identity, jobs, keys, models, plugins, state, strangers, up
from kernelm_cli.backup import backup, backup_key, restore
from kernelm_cli.call import call
from kernelm_cli.chat import chat
from kernelm_cli.checking import check
from kernelm_cli.deploying import deploy as deploy_model
from kernelm_cli.deploying import history, import_, promote
from kernelm_cli.dev import dev
from kernelm_cli.logs import logs
from kernelm_cli.packing import keygen, pack
from kernelm_cli.retrieval import ask, recommend, search
from kernelm_cli.run import run
from kernelm_cli.scaffold import new
from kernelm_cli.shadowing import shadow
from kernelm_cli.simulate import simulate
from kernelm_cli.usage import usage

app = App(
    name="kernelm", help="A microkernel operating system for language models.", version=lambda: version("kernelm-cli"),
    help_epilogue="KERNELM_HOME: the home. KERNELM_KEY: the API key. KERNELM_DEBUG=1: tracebacks.",
    error_console=Console(stderr=True),
)  # fmt: skip
for command in (up.up, up.down, run, state.ps, state.events, logs, call, chat, search, ask, recommend, usage, doctor.doctor,
                simulate, backup, restore, backup_key):
    app.command(command)
plugins.app.command(new)
plugins.app.command(check)
plugins.app.command(keygen)
plugins.app.command(pack)
plugins.app.command(dev)  # not there, since it builds upon the others
models.app.command(import_, name="import")
for command in (deploy_model, promote, shadow, history):
    models.app.command(command)
for group in (jobs.app, plugins.app, models.app, data.app, artifacts.app, keys.app, identity.app, deploy.app):
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
