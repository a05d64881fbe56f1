"""Room for readable copies: those whose readers are all gone make way."""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from kernelm_sdk.errors import Fault, KernelFault
from kernelm_sdk.system import Empty, Kernel, SystemState

if TYPE_CHECKING:  # there where copies are
    from kernelm_artifacts.plain import Plain

P, T = ParamSpec("P"), TypeVar("T")
SWEEP_S = 60.0  # between looks for copies that nobody has any more
ENDED = ("exited", "lost")  # states of instances
log = logging.getLogger("kernelm.artifacts")


class Caller(Protocol):
    """What is needed of the bus."""

    async def call(self, method: Any, request: Any) -> Any: ...


class Room:
    """Keeps the copies in `plain` no longer than they are wanted: `keep_s` after their last opening, and while a reader lives."""

    def __init__(self, bus: Caller, plain: "Plain", keep_s: float) -> None:
        self._bus, self._plain, self._keep_s = bus, plain, keep_s

    async def have(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """What `work` returns, in a thread. Where there is no room for a copy it is done once more, without the copies that nobody
        has any more."""
        try:
            return await asyncio.to_thread(work, *arguments, **named)
        except KernelFault as fault:
            if fault.code != "no_room" or not await self._sweep(0.0):
                raise
        return await asyncio.to_thread(work, *arguments, **named)

    async def keep(self) -> None:
        """Drop what is not wanted any more, for ever."""
        while True:
            await asyncio.sleep(SWEEP_S)
            await self._sweep(self._keep_s)

    async def _sweep(self, older_s: float) -> int:
        """Drop readable copies whose readers are all gone; none while the kernel, which knows who is there, does not answer."""
        try:
            state: SystemState = await self._bus.call(Kernel.state, Empty())
        except Fault as fault:
            log.warning("readable copies stay, since the kernel does not say who is there: %s", fault)
            return 0
        living = {i.id for i in state.instances if i.state not in ENDED}
        return await asyncio.to_thread(self._plain.sweep, living, older_s)
