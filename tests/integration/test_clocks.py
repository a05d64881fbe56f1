"""The kernel's clock is off: who may join and who is shut out is the broker's clock to decide, and no other's. Real processes, with
libfaketime between the kernel and the time."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kernelm.testing.harness import System, until
from kernelm.testing.parts import absent
from kernelm_authority.identity import LIFETIME_S, read
from kernelm_scheduler.plugin import SchedulerPlugin
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.enrollment import join, new_seed, public_key
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.plugin import find_manifests
from kernelm_sdk.system import Destination, Kernel, KeyCreated, KeyName, KeyRequest, Route

OFF = ["+3600", "-3600", "+400d"]  # libfaketime's: an hour ahead, an hour behind, a year and more ahead
A_MINUTE_S = 60


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with System(kernel="process") as system:
        yield system


async def restart_kernel(system: System, off: str = "", **environment: str) -> None:
    """The next kernel, whose clock is `off`; returns when it leads."""
    if off:
        library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None) or absent("apt-get install libfaketime")
        environment |= {"LD_PRELOAD": str(library), "FAKETIME": off, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    before = (await system.state()).leader_epoch
    system.processes["kernelm"].terminate()
    await asyncio.to_thread(system.processes["kernelm"].wait)
    system._spawn("kernelm", "kernelm", **environment)

    async def leads() -> bool:
        return (await system.state()).leader_epoch > before

    await until(leads, 30, "the next kernel")


async def push(system: System, generation: int) -> None:
    """Have the kernel sign and push its claims."""
    await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("p", 100),), generation), patience_s=10.0)


async def records(system: System, bucket: str, prefix: str) -> list[dict[str, str]]:
    """The headers of the records below `prefix` that are there."""
    bus = await Bus.connect(system.broker.url, system.authority.credentials("reader"))
    try:
        found = {subject: headers async for _, subject, _, headers in bus.read(f"KV_{bucket}", f"$KV.{bucket}.{prefix}.>")}
    finally:
        await bus.close()
    return [headers for headers in found.values() if "KV-Operation" not in headers]


async def refused(system: System, held: Credentials) -> None:
    with pytest.raises(Fault, match=r"refused|uthorization"):
        await Bus.connect(system.broker.url, held, timeout_s=3)


@pytest.mark.parametrize("off", OFF)
async def test_a_token_is_as_old_as_the_broker_says(system: System, off: str) -> None:
    await restart_kernel(system, off)
    token = system.authority.token("jobs")  # by a clock that is right
    credentials = await join(system.broker.url, token)
    assert credentials.user == "jobs"
    for date, expected in (("exp", time.time() + LIFETIME_S), ("iat", time.time())):
        assert abs(read(credentials.jwt)[date] - expected) < A_MINUTE_S, "members are let in for as long as ever"
    with pytest.raises(ClientFault, match="used already"):
        await join(system.broker.url, token)


@pytest.mark.parametrize("off", OFF)
async def test_instances_start_by_the_tokens_of_a_kernel_whose_clock_is_off(system: System, off: str) -> None:
    await restart_kernel(system, off)
    await system.node({"scheduler": (find_manifests()[0]["scheduler"], SchedulerPlugin)})

    async def there() -> bool:
        return any(i.plugin == "scheduler" and i.state == "ready" for i in (await system.state()).instances)

    await until(there, 30, "the scheduler")


async def test_a_token_is_remembered_for_as_long_as_it_is_good(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """One from a clock that is two hours ahead works for two hours more, and once."""
    with monkeypatch.context() as patch:
        patch.setattr(system.authority, "clock", lambda: time.time() + 7200)
        token = system.authority.token("jobs", ttl_s=600)
    await join(system.broker.url, token)
    (used,) = await records(system, "registry", "token")
    assert int(used["Nats-TTL"]) > 7200 + 600


@pytest.mark.parametrize("off", OFF)
async def test_a_revocation_outlives_the_key_whatever_the_kernels_clock_says(system: System, off: str) -> None:
    seed = new_seed()
    request = KeyRequest("acme", ("news",), expires_s=1800, public_key=public_key(seed))
    made: KeyCreated = await system.admin.call(Kernel.create_key, request)
    held = Credentials(f"key-{made.key.id}", made.jwt, seed)
    await system.admin.call(Kernel.revoke_key, KeyName(made.key.id))
    await restart_kernel(system, off)
    await push(system, 1)
    await refused(system, held)
    await restart_kernel(system)  # the clock is put right
    await push(system, 2)
    await refused(system, held)


async def test_who_is_shut_out_by_a_kernel_that_runs_ahead_is_out(system: System) -> None:
    """Whose JWT has expired for the kernel is not out yet: the broker still lets it in."""
    await restart_kernel(system, KERNELM_JWT_LIFETIME_S="1800")
    held = await join(system.broker.url, system.authority.token("jobs"))
    frozen = await system.track(Bus.connect(system.broker.url, held))
    await restart_kernel(system, "+3600", KERNELM_JWT_LIFETIME_S="1800")
    await join(system.broker.url, system.authority.token("jobs"))
    await until(lambda: not frozen.connected, 20, "the one before cut off")
    await refused(system, held)


async def test_a_revocation_goes_once_nobody_needs_it(system: System) -> None:
    await restart_kernel(system, KERNELM_JWT_LIFETIME_S="1")
    request = KeyRequest("acme", ("news",), expires_s=1, public_key=public_key(new_seed()))
    made: KeyCreated = await system.admin.call(Kernel.create_key, request)
    await system.admin.call(Kernel.revoke_key, KeyName(made.key.id))
    generation = 0

    async def gone() -> Any:
        nonlocal generation
        generation += 1
        await push(system, generation)
        return not await records(system, "routes", "revoked")

    await until(gone, 30, "the end of the record")
