"""From a manifest's `command` to a program that can be started: for plugins in other languages than Python."""

import os
import shutil
from pathlib import Path

from kernelm_node.runtimes.runtime import Launch
from kernelm_sdk.errors import ClientFault


def resolve(launch: Launch) -> tuple[tuple[str, ...], Path]:
    """(program with its full path and arguments, the plugin's folder). A program with a "/" in it is one of the plugin's own
    files; any other is looked for on the node's PATH. ClientFault "no_program" where it is not, written to the log as well:
    `diagnose` finds it there."""
    folder = launch.source or Path(launch.environment["KERNELM_MANIFEST"]).parent
    name, *arguments = launch.manifest.command
    found = _own(launch, folder / name) if "/" in name else shutil.which(name, path=launch.environment.get("PATH"))
    if found is None:
        where = "among its files" if "/" in name else "on the PATH of this node"
        remedy = "correct `command` in kernelm-plugin.toml" if "/" in name else \
            f"install {name} on this node, or correct `command` in kernelm-plugin.toml"  # fmt: skip
        fault = ClientFault("no_program", f"plugin {launch.plugin!r} is started by {name!r}, and there is no such program {where}",
                            remedy)  # fmt: skip
        with launch.log.open("a") as log:
            log.write(f"{fault}\n")
        raise fault
    return (found, *arguments), folder.absolute()


def _own(launch: Launch, file: Path) -> str | None:
    """A file of the plugin as a program. Stored files have no permission to be run, so those get a copy that has."""
    if not file.is_file():
        return None
    if os.access(file, os.X_OK):
        return str(file.absolute())
    copy = launch.scratch / file.name
    shutil.copyfile(file, copy)
    copy.chmod(0o700)
    return str(copy.absolute())
