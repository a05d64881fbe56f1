"""Runtime `inproc`: the runner as a task in the node's own process, for first-party plugins (distributions named
`kernelm-*`). It is light, and promises nothing: a task that does not yield can't be killed, and shares all memory.
The name is a convention and no boundary: whoever can install a distribution can run code anyway."""

import asyncio
import traceback
from importlib.metadata import entry_points
from typing import Any, ClassVar

from kernelm_node.runtimes.runtime import Exit, Handle, Launch, Runtime, Task
from kernelm_sdk.endings import last_words
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.plugin import GROUP

FIRST_PARTY = "kernelm-"


class InprocTask(Task):
    """A task of this event loop. Its crash is an exit like any other."""

    def __init__(self, launch: Launch) -> None:
        self._launch, self._stopping = launch, asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"inproc-{launch.instance}")

    @property
    def state(self) -> dict[str, Any]:
        return {}

    @property
    def pid(self) -> int:
        return 0

    async def wait(self) -> Exit:
        await asyncio.wait([self._task])
        return Exit(-9, "cancelled by the node") if self._task.cancelled() else self._task.result()

    def ask(self) -> None:
        self._stopping.set()

    async def kill(self) -> None:
        self._task.cancel()

    async def _run(self) -> Exit:
        from kernelm_sdk.runner import run_instance

        try:
            return Exit(await run_instance(self._launch.environment, self._stopping))
        except Fault as fault:
            self._write(f"{last_words(fault)}\n")
        except SystemExit as end:  # would end the node's loop
            return Exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        except Exception:
            self._write(traceback.format_exc())
        return Exit(1)

    def _write(self, text: str) -> None:
        with self._launch.log.open("a") as log:
            log.write(text)


class InprocRuntime(Runtime):
    """One task an instance."""

    name: ClassVar[str] = "inproc"

    async def start(self, launch: Launch) -> Task:
        if launch.source is not None:
            raise ClientFault("permission_denied", f"plugin {launch.plugin!r} comes as an artifact: it may not run in the node's "
                              "process", "use the runtime 'process', 'venv' or 'container'")  # fmt: skip
        require_first_party(launch.plugin)
        return InprocTask(launch)

    async def adopt(self, handle: Handle) -> Task | None:
        return None  # it ended with the process that it was a part of


def require_first_party(plugin: str) -> None:
    """ClientFault "permission_denied" unless the plugin comes with a distribution named `kernelm-*`."""
    owners = {point.dist.name if point.dist else "" for point in entry_points(group=GROUP, name=plugin)}
    if not owners or not all(owner.lower().replace("_", "-").startswith(FIRST_PARTY) for owner in owners):
        source = ", ".join(sorted(owners)) or "not installed"
        raise ClientFault("permission_denied", f"plugin {plugin!r} ({source}) may not run in the node's process",
                          "use the runtime 'process': 'inproc' is for kernelm's own plugins")  # fmt: skip
