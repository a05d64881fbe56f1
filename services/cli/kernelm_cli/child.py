"""One child process of the launcher: started, watched, started again when it dies, stopped."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from kernelm_cli.home import ChildProcess, last_lines, open_log
from kernelm_sdk.children import die_with
from kernelm_sdk.errors import KernelFault

BACKOFF_S, BACKOFF_MAX_S = 0.2, 10.0  # before a restart; doubled by each
HEALTHY_S = 30.0  # after so long the next death is the first again
log = logging.getLogger("kernelm.launcher")


def describe_exit(code: int) -> str:
    """An exit status in words: "exit code 1", "SIGKILL"."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


class Child:
    """A process that shall run. `environment` is asked at each start: a join token serves only once."""

    def __init__(self, home: Path, name: str, command: list[str], environment: Callable[[], dict[str, str]],
                 changed: Callable[[], None]) -> None:  # fmt: skip
        self.home, self.name = home, name
        self.restarts = 0
        self.process: asyncio.subprocess.Process | None = None
        self.identity = ChildProcess(0, 0.0)
        self._command, self._environment, self._changed = command, environment, changed
        self._began, self._log_start, self._stopping = 0.0, 0, False
        self._keeper: asyncio.Task[None] | None = None

    @property
    def log_file(self) -> Path:
        return self.home / "logs" / f"{self.name}.log"

    async def start(self) -> None:
        """Start the process in a session of its own, so that Ctrl-C reaches the launcher alone, which stops in order."""
        output = open_log(self.home, self.name)
        self._log_start = os.fstat(output).st_size
        try:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment(), stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=die_with(os.getpid()), cwd="/",
            )  # fmt: skip
        finally:
            os.close(output)
        self._began = time.monotonic()
        try:
            created = psutil.Process(self.process.pid).create_time()
        except psutil.NoSuchProcess:  # dead and reaped already: its keeper, or `check`, will say so
            created = 0.0
        self.identity = ChildProcess(self.process.pid, created, self.restarts)
        self._changed()

    def check(self) -> None:
        """KernelFault "child_failed" with the last lines of its log if the process has ended."""
        code = self.process.returncode if self.process else None
        if code is not None:
            raise KernelFault("child_failed", f"{self.name} ended with {describe_exit(code)}",
                              f"read {self.log_file}, and `kernelm doctor`", child=self.name, log=self.last_lines())  # fmt: skip

    def last_lines(self) -> str:
        """The end of what this start of the process wrote to its log."""
        return last_lines(self.home, self.name, self._log_start)

    def keep(self) -> None:
        """From now on start the process again whenever it ends."""
        self._keeper = asyncio.create_task(self._keep(), name=f"keep-{self.name}")

    def restart(self) -> None:
        """Ask the process to end; its keeper starts it again."""
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()

    async def _keep(self) -> None:
        pause = BACKOFF_S
        while self.process is not None:
            code = await self.process.wait()
            if self._stopping:
                return
            if time.monotonic() - self._began > HEALTHY_S:
                pause = BACKOFF_S
            log.warning("%s ended with %s; next start in %.1f s", self.name, describe_exit(code), pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF_MAX_S)
            self.restarts += 1
            try:
                await self.start()
            except OSError as error:  # a full disk, a program being replaced: may pass
                log.error("%s can't be started: %s", self.name, error)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL to its session after `grace_s`."""
        self._stopping = True
        if self._keeper is not None:
            self._keeper.cancel()
        if self.process is None or self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), grace_s)
        except TimeoutError:
            log.warning("%s did not stop within %g s and is killed", self.name, grace_s)
            os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()
