"""`python -m kernelm_cli.confined`: where a third party's command runs. Before any of its code is imported this process gives up
the right to open files but those that it needs (Landlock, landlock(7)): Python and its packages for reading, the folder that the
user is in, and a scratch folder. So it can't read a key of the home, nor look into the process that holds the administrator's.

It starts with {"name", "arguments", "read", "write"} on the descriptor that its argument names, asks there for a connection with
{"connect": <public nkey>}, and gets {"url", "user", "jwt"} or {"fault"}. The seed of its key never leaves it.
"""

import os
import socket
import sys
from typing import Any

import msgspec

from kernelm_cli.hooks import GROUP, Commands
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.enrollment import new_seed, public_key
from kernelm_sdk.errors import FaultBody, KernelFault, from_body
from kernelm_sdk.hooks import Hooks


class Order(msgspec.Struct, frozen=True):
    """What is to be run, and what it may open."""

    name: str
    arguments: tuple[str, ...]
    read: tuple[str, ...]
    write: tuple[str, ...]


class Asked(msgspec.Struct, frozen=True):
    """A connection is wanted for the holder of this public key; or, without one, why the command could not be run."""

    connect: str = ""
    fault: FaultBody | None = None


class Given(msgspec.Struct, frozen=True):
    """What it connects with."""

    url: str = ""
    user: str = ""
    jwt: str = ""
    fault: FaultBody | None = None


def confine(order: Order) -> None:
    """Open from now on only what `order` grants; KernelFault "unsupported" where the machine can't enforce it."""
    try:
        from landlock import FSAccess, Ruleset

        rules = Ruleset()
        look = FSAccess.READ_FILE | FSAccess.READ_DIR | FSAccess.EXECUTE
        for path in order.read:
            rules.allow(path, rules=look if os.path.isdir(path) else look & FSAccess.all_file())  # noqa: PTH112
        for path in order.write:
            rules.allow(path, rules=FSAccess.all() if os.path.isdir(path) else FSAccess.all_file())  # noqa: PTH112
        rules.apply()
    except (ImportError, OSError) as error:
        raise KernelFault("unsupported", f"commands of third parties run confined, which this machine can't do: {error}",
                          "it needs Linux 5.13 or newer with Landlock, and the package landlock") from error  # fmt: skip


def main() -> int:
    """Confine, import, run; the exit code."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    with channel, channel.makefile("rwb") as stream:
        order = msgspec.json.decode(stream.readline(), type=Order)

        def say(message: Asked) -> None:
            stream.write(msgspec.json.encode(message) + b"\n")
            stream.flush()

        async def connect() -> Bus:
            seed = new_seed()
            say(Asked(public_key(seed)))
            given = msgspec.json.decode(stream.readline(), type=Given)
            if given.fault is not None:
                raise from_body(given.fault)
            return await Bus.connect(given.url, Credentials(given.user, given.jwt, seed))

        try:
            confine(order)
        except KernelFault as fault:
            say(Asked(fault=fault.body()))
            return 1
        sys.argv = [order.name, *order.arguments]
        return run(order, connect, say)


def run(order: Order, connect: Any, say: Any) -> int:
    """The command's exit code; 1 after its name and reason were told, if it is broken."""
    hooks = Hooks(GROUP, Commands, only=order.name)
    for _, answer in hooks.call("run_command", arguments=order.arguments, connect=connect):
        if isinstance(answer, int):
            return answer
        hooks.quarantine(order.name, f"run_command answered {answer!r}, and not an exit code")
    why = hooks.quarantined.get(order.name, "it is not installed any more")
    what, remedy = f"command {order.name!r} is broken: {why}", "mend or uninstall the distribution that it is of"
    say(Asked(fault=KernelFault("broken_command", what, remedy).body()))
    return 1


if __name__ == "__main__":
    sys.exit(main())
