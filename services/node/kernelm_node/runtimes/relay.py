"""The way of a container to the broker: a process of its own that relays from a Unix socket (`python -m kernelm_sdk.relay`),
so that calls go on while the node is away. It ends when its socket was removed with the instance, or replaced."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from kernelm_sdk.relay import listen
from kernelm_sdk.tls import VARIABLES

CONNECTIONS = 16  # of one instance; its runner needs one or two
SOCKET = "broker.sock"
running: set["subprocess.Popen[bytes]"] = set()  # our children, to be reaped


def begin(folder: Path, target: str, owner: int, log: Path) -> None:
    """Relay from `folder`/SOCKET, which `owner` can connect to when this returns, to the broker at the URL `target`."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if os.geteuid() != owner:
        os.chown(folder, owner, owner)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KERNELM_") or k in VARIABLES}
    with listen(folder / SOCKET, owner) as listening, log.open("ab") as output:
        what = (listening.fileno(), folder / SOCKET, target, CONNECTIONS)
        command = [sys.executable, "-m", "kernelm_sdk.relay", *map(str, what)]
        running.add(subprocess.Popen(command, pass_fds=[listening.fileno()], env=environment, start_new_session=True,
                                     stdin=subprocess.DEVNULL, stdout=output, stderr=output))  # fmt: skip
    (folder.parent / f"{folder.name}.url").write_text(target)
    reap()


def goes_on(folder: Path, target: str) -> bool:
    """Whether one relays there, to `target`."""
    try:
        if (folder.parent / f"{folder.name}.url").read_text() != target:
            return False
        reach = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(f"/proc/self/fd/{reach}/{SOCKET}")
        except OSError:
            return False
        finally:
            os.close(reach)
    return True


def end(folder: Path) -> None:
    """The one there ends within a second. May be called twice."""
    (folder.parent / f"{folder.name}.url").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    reap()


def reap() -> None:
    """Those of our children that have ended."""
    running.difference_update([child for child in running if child.poll() is not None])
