"""Durable events through a real broker that is frozen, restarted and lied to."""

from typing import ClassVar

import msgspec
import psutil
import pytest

from kernelm.journal import audit
from kernelm.testing.harness import System, until
from kernelm_sdk.errors import KernelFault
from kernelm_sdk.events import Event


class Noted(Event, frozen=True):
    """Something that a test published."""

    TYPE: ClassVar[str] = "noted.here"
    n: int


async def test_an_event_in_doubt_does_not_swallow_the_next_one() -> None:
    """The first publish is given up while the broker is frozen, and stored all the same when it wakes up."""
    async with System() as system:
        bus = await system.connect("jobs")
        await bus.publish(Noted(n=1))
        broker = psutil.Process(system.processes["broker"].pid)
        broker.suspend()
        await until(lambda: broker.status() == psutil.STATUS_STOPPED, 10.0, "a frozen broker")
        try:
            with pytest.raises(KernelFault):
                await bus.publish(Noted(n=2), patience_s=0.0)
        finally:
            broker.resume()
        await bus.publish(Noted(n=3), patience_s=20.0)
        await bus.publish(Noted(n=4), patience_s=20.0)
        stored = [msgspec.json.decode(body)["n"] async for _, _, body, _ in bus.read("EVT", "evt.noted.here.*")]
        assert stored in ([1, 2, 3, 4], [1, 3, 4])
        assert (await audit(system.admin)).text == "intact"


async def test_an_audit_names_what_is_gone_from_a_source_s_beginning_and_survives_garbage() -> None:
    async with System() as system:
        bus = await system.connect("jobs")
        for headers in ({"ce-sequence": "1.5"}, {"ce-sequence": "many"}, {}):
            await bus.append("evt.noted.here.jobs", b"\xff{", headers)
        before = await audit(system.admin)
        assert (len(before.damaged), before.missing) == (3, {})
        bus._sequence = 4  # as if its first four had been stored and were cut off by a damaged block
        await bus.publish(Noted(n=5))
        assert (await audit(system.admin)).missing == {f"jobs.{bus.boot}": 4}
