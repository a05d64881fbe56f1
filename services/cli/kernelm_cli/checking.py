"""`kernelm plugin check PATH`: the conformance kit on a system of its own, for people, programs and CI."""

import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from kernelm_cli import staging
from kernelm_cli.session import stdout
from kernelm_sdk.errors import ClientFault


def check(path: Annotated[Path, Parameter(name="PATH")], /, *,
          runtime: Annotated[tuple[Literal["process", "venv", "container", "inproc", "all"], ...],
                             Parameter(consume_multiple=False, negative="")] = (),
          chaos: Annotated[bool, Parameter(negative="")] = False, command: str = "", image: str = "",
          json: Annotated[bool, Parameter(negative="")] = False, junit: Path | None = None) -> int:  # fmt: skip
    """Try what holds of every good plugin of its contracts, on a system of its own. Exit code 1 if a rule is broken, or if
    it can run in none of the runtimes that were named.

    Parameters
    ----------
    path
        The plugin's folder.
    runtime
        Run it in this runtime of the node's, as a system would; may be given several times. Without it: a plain process,
        which is the quickest.
    chaos
        Kill it, freeze it, restart the broker under it, corrupt its input and fill its disk as well.
    command
        What starts an instance of a plugin that is not in Python, run in its folder, e.g. "node main.js".
    image
        Of containers: the id of an image that has what the plugin imports.
    json
        Print JSON instead of a table.
    junit
        Write JUnit XML to this file.
    """
    from kernelm.testing.conformance import RUNTIMES, Report, as_json, as_junit, check_in, check_plugin, show

    os.environ.pop("KERNELM_TRUST", None)  # the system of its own trusts what is to be checked

    def told(report: Report) -> None:
        if not json:
            show(report, stdout())

    if runtime:
        if command:
            raise ClientFault("invalid", "--command and --runtime", "in a runtime the manifest's `command` is what starts it")
        wanted = RUNTIMES if "all" in runtime else tuple(dict.fromkeys(runtime))
        reports = asyncio.run(check_in(wanted, path, _stage, chaos, image, told))
    else:
        reports = [asyncio.run(check_plugin(path, chaos, tuple(shlex.split(command))))]
        told(reports[0])
    if junit is not None:
        junit.parent.mkdir(parents=True, exist_ok=True)
        junit.write_text(as_junit(reports))
    if json:
        sys.stdout.write(as_json(reports))
    ran = any(result.status != "skipped" for report in reports for result in report.results)
    return 0 if ran and all(report.good for report in reports) else 1


def _stage(folder: Path, into: Path) -> None:
    """What `kernelm plugin load` would store."""
    staging.stage(staging.find(folder), into)
