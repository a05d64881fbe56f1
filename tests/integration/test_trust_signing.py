"""The account's signing key is replaced while members work: nobody notices, and a stolen one can be made worthless."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_authority.identity import LIFETIME_S, Authority, Grant, init_home, read
from kernelm_authority.rotation import rotate
from kernelm_sdk.bus import Bus, Credentials
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.enrollment import join, new_seed, public_key, renew
from kernelm_sdk.errors import Fault
from kernelm_sdk.plugin import Call, Manifest, Plugin


class Word(msgspec.Struct, frozen=True):
    text: str = ""


class Echo(Contract, name="signing-echo", major=1):
    @unary
    async def say(self, request: Word, call: Any) -> Word: ...


class EchoPlugin(Plugin, Echo):
    async def say(self, request: Word, call: Call) -> Word:
        return request


MANIFEST = Manifest("echo", "1", "says it again", ("signing-echo/1",), f"{__name__}:EchoPlugin")


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with System() as system:
        member = await system.plugin(EchoPlugin, MANIFEST)
        member.own_process = False  # it is a part of this one
        yield system


def issuer(jwt: str) -> str:
    return str(read(jwt)["iss"])


def of(authority: Authority, since: int = -1) -> str:
    return next(key.public for key in authority.signing.all() if key.until == 0 and key.since > since)


async def test_members_go_on_and_take_up_the_new_key_when_they_renew(system: System) -> None:
    authority = Authority(system.home)
    first = of(authority)
    caller = await system.connect("gateway")
    assert issuer(caller.credentials.jwt) == first
    answered, over = 0, asyncio.Event()

    async def load() -> None:
        nonlocal answered
        while not over.is_set():
            await caller.call(Echo.say, Word("a"), timeout_s=10.0)  # raises, and fails the test
            answered += 1

    loading = asyncio.create_task(load())
    second = await rotate(authority, system.broker.url)
    assert second != first
    assert authority.signing.public() == sorted((first, second))
    await renew(caller, new_seed())
    assert issuer(caller.credentials.jwt) == second
    before = answered
    await until(lambda: answered > before + 20 or loading.done(), 20, "calls after the renewal")
    over.set()
    await loading
    token = msgspec.json.decode(base64.urlsafe_b64decode(authority.token("late") + "==="), type=Credentials)
    assert issuer(token.jwt) == second


async def test_what_a_stolen_key_signed_is_worth_nothing(system: System) -> None:
    authority = Authority(system.home)
    stolen = authority.signing.in_use()
    member = await system.connect("gateway")
    token = authority.token("jobs")
    await rotate(authority, system.broker.url, drop_others=True)
    await until(lambda: member.closed, 20, "the end of a connection that the stolen key let in")
    with pytest.raises(Fault, match=r"(?i)authori"):
        await join(system.broker.url, token)
    forged = forge(authority, stolen)
    with pytest.raises(Fault, match=r"(?i)authori"):
        await Bus.connect(system.broker.url, forged, timeout_s=3)
    assert [key.until for key in authority.signing.all()] == [0]
    again = await system.connect("gateway")  # who starts again is let in by the new key
    assert issuer(again.credentials.jwt) == of(authority)
    assert (await system.state()).health["routes"] == "in force", "the administrator and the kernel go on"


async def test_a_forged_jwt_counts_as_long_as_its_key_does(system: System) -> None:
    """Else the test above would prove nothing."""
    authority = Authority(system.home)
    bus = await Bus.connect(system.broker.url, forge(authority, authority.signing.in_use()), timeout_s=30)
    await bus.close()


async def test_an_interrupted_rotation_is_finished_by_the_next(system: System) -> None:
    authority = Authority(system.home)
    first, prepared = of(authority), authority.signing.prepare()
    assert authority.signing.in_use() != "", "the first one goes on signing"
    assert of(authority, since=0) == first
    assert await rotate(authority, system.broker.url) == prepared


async def test_without_a_kernel_nothing_changes(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelm_authority.rotation.PATIENCE_S", 1.0)
    authority = Authority(system.home)
    first = of(authority)
    await system.kernel.stop()
    with pytest.raises(Fault, match="kernelm ps"):
        await rotate(authority, system.broker.url)
    assert of(authority, since=0) == first


def test_a_replaced_key_is_listed_for_as_long_as_what_it_signed_may_live(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = init_home(tmp_path / "home")
    first = of(authority)
    authority.signing.prepare()
    authority.signing.use_next()
    assert first in authority.signing.public()
    later = time.time() + LIFETIME_S + 5
    monkeypatch.setattr(authority.signing, "_clock", lambda: later)
    assert first not in authority.signing.public()
    files = list((tmp_path / "home" / "identity" / "signing").iterdir())
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}
    assert authority.signing.in_use() not in repr(authority.signing.all())


def forge(authority: Authority, seed: str) -> Credentials:
    """What a thief makes of a signing key."""
    authority.signing.in_use = lambda: seed  # type: ignore[method-assign]
    mine = new_seed()
    jwt, expires = authority.issue(Grant("service", "mallory"), public_key(mine))
    del authority.signing.in_use  # type: ignore[method-assign]
    assert issuer(jwt) == public_key(seed)
    return Credentials("mallory", jwt, mine, expires)


