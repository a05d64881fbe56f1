"""How long the job service waits for a scheduler."""

import asyncio
from collections.abc import AsyncIterator

import pytest

import kernelm_jobs.asking
from kernelm.testing.harness import System
from kernelm_contracts.scheduler import ClusterState, Decisions, Scheduler
from kernelm_jobs.asking import Asking
from kernelm_sdk.errors import Fault, KernelFault
from kernelm_sdk.plugin import Call, Manifest, Plugin

MANIFEST = Manifest("sleepy", "1", "decides nothing", ("scheduler/1",), f"{__name__}:Sleepy")
STATE = ClusterState(0, 0.0, (), ())


class Sleepy(Plugin, Scheduler):
    takes_s = 0.0

    async def decide(self, request: ClusterState, call: Call) -> Decisions:
        await asyncio.sleep(Sleepy.takes_s)
        return Decisions(request.version, ())


@pytest.fixture
async def system() -> AsyncIterator[System]:
    Sleepy.takes_s = 0.0
    async with System() as system:
        await system.plugin(Sleepy, MANIFEST)
        yield system


async def test_one_that_was_quick_and_hangs_is_given_up_soon(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelm_jobs.asking, "TIMEOUT_S", 600.0)
    asking = Asking(await system.connect("jobs"), "test")
    await asking.decide(STATE)
    Sleepy.takes_s = 600.0
    async with asyncio.timeout(120.0):  # far from the whole time
        with pytest.raises(Fault, match="no answer"):
            await asking.decide(STATE)
    Sleepy.takes_s = 3.0  # longer than the shortest patience: it doubles with every failure
    for _ in range(4):
        try:
            await asking.decide(STATE)
            break
        except Fault:
            continue
    else:
        pytest.fail("its patience does not grow")


async def test_one_that_nobody_knows_yet_has_the_whole_time(system: System) -> None:
    Sleepy.takes_s = 3.0
    asking = Asking(await system.connect("jobs"), "test")
    assert (await asking.decide(STATE)).decisions == ()


async def test_where_there_is_none_the_contract_is_named_and_what_says_why() -> None:
    async with System() as system:
        asking = Asking(await system.connect("jobs"), "test")
        with pytest.raises(KernelFault, match="no plugin that implements scheduler/1 is ready") as caught:
            await asking.decide(STATE)
    assert caught.value.retriable
    for command in ("kernelm plugin list", "kernelm ps --all", "kernelm doctor"):
        assert f"`{command}`" in caught.value.remedy
