"""`kernelm plugin check PATH`: the conformance kit on a system of its own, for people, programs and CI."""

import asyncio
import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kernelm_cli.session import stdout


def check(path: Annotated[Path, Parameter(name="PATH")], /, *, chaos: Annotated[bool, Parameter(negative="")] = False,
          command: str = "", json: Annotated[bool, Parameter(negative="")] = False,
          junit: Path | None = None) -> int:  # fmt: skip
    """Try what holds of every good plugin of its contracts, on a system of its own. Exit code 1 if a rule is broken.

    Parameters
    ----------
    path
        The plugin's folder.
    chaos
        Kill it, freeze it, and restart the broker under it as well.
    command
        What starts an instance of a plugin that is not in Python, run in its folder, e.g. "node main.js".
    json
        Print JSON instead of a table.
    junit
        Write JUnit XML to this file.
    """
    from kernelm.testing.conformance import as_json, as_junit, check_plugin, show

    report = asyncio.run(check_plugin(path, chaos, tuple(shlex.split(command))))
    if junit is not None:
        junit.parent.mkdir(parents=True, exist_ok=True)
        junit.write_text(as_junit([report]))
    if json:
        sys.stdout.write(as_json([report]))
    else:
        show(report, stdout())
    return 0 if report.good else 1
