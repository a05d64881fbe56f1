"""The life of a member when the kernel is not there."""

import asyncio
from typing import Any

from kernelm.testing.harness import System
from kernelm_authority.identity import Grant
from kernelm_sdk.plugin import Context, Plugin
from kernelm_sdk.runner import Member
from kernelm_sdk.system import Manifest

MANIFEST = Manifest("idle", "1", "does nothing", (), "tests:Idle")


async def test_a_member_that_shall_stop_does_not_wait_for_the_kernel_to_come_back() -> None:
    async with System() as system:
        bus = await system.connect("idle-1", Grant("plugin", "idle-1", "idle", "idle"))
        context = Context(bus, "idle-1", "idle", MANIFEST, system.home)
        member = Member(bus, "idle-1", "idle", "1", ())
        alone = asyncio.Event()

        class Idle(Plugin):
            async def on_start(self) -> None:
                assert system.kernel
                await system.kernel.stop()  # between hello and ready
                alone.set()

        async def build(settings: dict[str, Any]) -> Plugin:
            return Idle(context, None)

        life = asyncio.create_task(member.run(build))
        await alone.wait()
        member.stopping.set()
        await asyncio.wait_for(life, 30.0)  # `ready` itself has the patience of a minute
