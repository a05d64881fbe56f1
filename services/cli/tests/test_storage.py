"""When the launcher takes a broker for one that stores nothing any more."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from kernelm import kernel
from kernelm.testing.harness import System, until
from kernelm_cli import storage


@asynccontextmanager
async def watched(system: System, restart: Callable[[], None]) -> AsyncIterator[None]:
    task = asyncio.create_task(storage.watch(system.broker.url, system.home, restart))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_lease_that_stays_what_it_was_is_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOOK_S", 0.05)
    monkeypatch.setattr(storage, "LEASE_S", 0.3)  # the kernel writes every second: so it looks like a broker that keeps nothing
    restarts: list[float] = []
    async with System() as system, watched(system, lambda: restarts.append(time.monotonic())):
        await until(lambda: bool(restarts), 30, "the broker to be started again")


@pytest.mark.parametrize("off_s", [-3600, 3600])
async def test_the_kernels_clock_is_none(off_s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "time", SimpleNamespace(time=lambda: time.time() + off_s, monotonic=time.monotonic))
    monkeypatch.setattr(storage, "LOOK_S", 0.05)
    looks: list[int] = []
    look = storage._revision

    async def counted(bus: storage.Bus) -> int:
        revision = await look(bus)
        looks.append(revision)
        return revision

    monkeypatch.setattr(storage, "_revision", counted)
    restarts: list[float] = []
    async with System() as system, watched(system, lambda: restarts.append(time.monotonic())):
        await until(lambda: len(set(looks)) > 2, 30, "the kernel to have renewed its lease twice")
    assert not restarts
