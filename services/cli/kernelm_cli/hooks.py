"""The hook for commands of third parties: an entry point in the group `kernelm.commands` adds `kernelm NAME`.

    # pyproject.toml                                # my_commands.py
    [project.entry-points."kernelm.commands"]       from kernelm_sdk.hooks import hookimpl
    greet = "my_commands"
                                                    @hookimpl
                                                    def run_command(arguments, connect):
                                                        \"\"\"Say hello.\"\"\"
                                                        print("hello", *arguments)
                                                        return 0

It is run in a process of its own that can't read the home's keys (confined.py).
"""

from collections.abc import Awaitable, Callable

from kernelm_sdk.bus import Bus
from kernelm_sdk.hooks import hookspec

GROUP = "kernelm.commands"


class Commands:
    """What a distribution implements."""

    @hookspec(firstresult=True)
    def run_command(self, arguments: tuple[str, ...], connect: Callable[[], Awaitable[Bus]]) -> int:
        """Run the command with what stands behind its name; its exit code. `connect` gives a connection to the system as a client
        that may call every model, under a key that ends with the command; KernelFault "not_running" if nothing runs."""
        raise NotImplementedError
