"""The harness's node, whose instances are tasks of the test's own process: nothing of them outlives its system, or complains."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kernelm.testing.harness import System, until, within
from kernelm.testing.node import InlineNode
from kernelm_authority.identity import Grant
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.plugin import Manifest, Plugin
from kernelm_sdk.system import PoolSpec, StartInstance

IDLE = Manifest("idle", "1", "does nothing", (), "tests:Idle", default=False)
LEASE, USAGE = "Member._renew_lease", "Meter.run"


class Idle(Plugin):
    """Does nothing."""


def beside(*names: str) -> list[str]:
    """What members do beside their work, and is under way."""
    return [name for task in asyncio.all_tasks() if (name := getattr(task.get_coro(), "__qualname__", "")) in names]


@contextlib.asynccontextmanager
async def started() -> AsyncIterator[tuple[System, InlineNode]]:
    """A system with three instances on an inline node; after that, none of them is left."""
    async with System(manifests={"idle": IDLE}) as system:
        node = await system.node({"idle": (IDLE, Idle)})
        await system.pool(PoolSpec("idle", "idle", instances=3))
        await until(lambda: len(beside(LEASE)) == 4, 20, "three instances beside the node")
        yield system, node
    await within(lambda: not beside(LEASE, USAGE), 5, "the end of what goes on beside their work")
    assert not node.members


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What instances have said that somebody should look at."""
    return [r.getMessage() for r in caplog.records if r.name == "kernelm.runner" and r.levelno >= logging.WARNING]


async def test_a_system_ends_without_a_complaint_of_its_instances(caplog: pytest.LogCaptureFixture) -> None:
    async with started():
        caplog.clear()
    assert complaints(caplog) == []


async def test_its_instances_end_without_a_broker_too() -> None:
    async with started() as (system, _):
        system.processes["broker"].kill()
        system.processes["broker"].wait()


async def test_one_that_was_killed_says_nothing_and_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async with started() as (_, node):
        caplog.clear()
        before = set(node.members)
        await node.kill(min(before))
        assert complaints(caplog) == []
        await until(lambda: len(node.members) == 3 and set(node.members) != before, 20, "another one in its place")


async def test_one_that_is_killed_while_it_renews_its_lease_says_nothing_either(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started() as (_, node):
        renewing, append = asyncio.Queue[str](), Bus.append

        async def seen(bus: Bus, subject: str, *rest: Any, **more: Any) -> Any:
            if subject.startswith("$KV.leases.idle-"):
                renewing.put_nowait(subject.rpartition(".")[2])
            return await append(bus, subject, *rest, **more)

        monkeypatch.setattr(Bus, "append", seen)
        await node.kill(await renewing.get())  # one that is at work
        started_anew = await renewing.get()
        while started_anew in list(node.members)[:2]:
            started_anew = await renewing.get()
        await node.kill(started_anew)  # one that is not ready yet
        assert complaints(caplog) == []


async def test_a_start_that_comes_too_late_starts_nothing() -> None:
    async with started() as (system, node):
        await node.on_stop()
        token = system.authority.token("idle-late", Grant("plugin", "idle-late", "idle", "idle"))
        with pytest.raises(KernelFault, match="the node stops: idle-late was not started"):
            await node.start(StartInstance("idle-late", "idle", "idle", "process", token), None)
