"""A start that takes long (building an environment, fetching an image) behind a task that is there at once, so that the
kernel's `start` call is answered, other instances start meanwhile, and a failure is reported as an exit like any other."""

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from kernelm_node.runtimes.runtime import Exit, Task
from kernelm_sdk.errors import Fault

log = logging.getLogger("kernelm.node")


class PreparedTask(Task):
    """The task that `begin` makes, from its beginning on. A Fault of `begin` goes to the instance's log, and is exit 1."""

    def __init__(self, begin: Coroutine[Any, Any, Task], output: Path, instance: str) -> None:
        self._output, self._task, self._killed = output, None, False
        self._begin: asyncio.Task[Task] = asyncio.create_task(begin, name=f"prepare-{instance}")

    _task: Task | None

    @property
    def state(self) -> dict[str, Any]:
        return self._task.state if self._task else {}

    @property
    def pid(self) -> int:
        return self._task.pid if self._task else 0

    async def wait(self) -> Exit:
        if self._task is None:
            await asyncio.wait([self._begin])
            if self._begin.cancelled():
                return Exit(-9, "stopped while it was being prepared")
            if error := self._begin.exception():
                return self._failed(error)
            self._task = self._begin.result()
            self._task.changed = self.changed
            self.changed()
        return await self._task.wait()

    def ask(self) -> None:
        if self._task is None and not self._begin.done():
            self._begin.cancel()
        elif task := self._started():
            task.ask()

    async def kill(self) -> None:
        self._begin.cancel()
        if task := self._started():
            await task.kill()

    def _started(self) -> Task | None:
        """The task, also when `wait` has not run since it began."""
        if self._task or not self._begin.done() or self._begin.cancelled() or self._begin.exception():
            return self._task
        return self._begin.result()

    def _failed(self, error: BaseException) -> Exit:
        if not isinstance(error, Fault):
            log.error("preparing %s failed", self._begin.get_name(), exc_info=error)
        with self._output.open("a") as output:
            output.write(f"{error if isinstance(error, Fault) else f'{type(error).__name__}: {error}'}\n")
        return Exit(1, "it could not be prepared")
