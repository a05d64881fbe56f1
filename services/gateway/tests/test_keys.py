"""Who gets in, and for how long."""

import asyncio
import hashlib
import time
from typing import Any

import msgspec
import pytest

from kernelm_contracts.jobs import Jobs
from kernelm_contracts.server import Server
from kernelm_gateway.keys import KeyRing, grant, sees
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import ClientFault


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_good_key(bus: Any, auth: Any) -> None:
    assert (await KeyRing(bus.keys).check(auth())).tenant == "acme"
    assert (await KeyRing(bus.keys).check(auth().replace("Bearer", "bearer"))).id == "k1"


@pytest.mark.parametrize("header", [
    "", "Bearer", "Bearer ", "Bearer km_k1", "Bearer km_k1_", "Bearer km__x", "Basic km_k1_x", "Bearer sk_k1_x", "km_k1_x",
    "Bearer km_k1_wrong", "Bearer km_nobody_x", "Bearer km_../k1_x", "Bearer km_K1_x", "Bearer km_*_x",
])  # fmt: skip
async def test_no_key_and_wrong_keys(bus: Any, header: str) -> None:
    with pytest.raises(ClientFault) as caught:
        await KeyRing(bus.keys).check(header)
    assert (caught.value.code, caught.value.http_status) == ("unauthorized", 401)
    assert "kernelm key create" in caught.value.remedy


async def test_the_hash_is_no_key(bus: Any, auth: Any) -> None:
    with pytest.raises(ClientFault, match="not known"):
        await KeyRing(bus.keys).check(auth(secret=bus.keys.records["k1"].hash))


async def test_revoked_and_expired(bus: Any, auth: Any, new_key: Any) -> None:
    bus.keys.records |= {"old": new_key("old", expires=int(time.time()) - 1), "bad": new_key("bad", revoked=True),
                         "new": new_key("new", expires=int(time.time()) + 60)}  # fmt: skip
    ring = KeyRing(bus.keys)
    assert (await ring.check(auth("new"))).id == "new"
    for identifier, what in (("old", "has expired"), ("bad", "was revoked")):
        with pytest.raises(ClientFault, match=what):
            await ring.check(auth(identifier))


async def test_a_revocation_bites_within_a_second_and_not_every_call_asks(bus: Any, auth: Any) -> None:
    clock = Clock()
    ring = KeyRing(bus.keys, 1.0, clock)
    for _ in range(10):
        await ring.check(auth())
    assert bus.keys.reads == 1
    bus.keys.records["k1"] = msgspec.structs.replace(bus.keys.records["k1"], revoked=True)
    clock.now += 1.0
    with pytest.raises(ClientFault, match="revoked"):
        await ring.check(auth())


async def test_after_a_rotation_the_old_secret_is_good_for_the_overlap(bus: Any, auth: Any, new_key: Any) -> None:
    old = new_key("k2", previous_until=int(time.time()) + 60)
    new = msgspec.structs.replace(old, hash=hashlib.sha256(b"new").hexdigest(), previous_hash=old.hash)
    bus.keys.records["k2"] = new
    ring = KeyRing(bus.keys, 0.0)
    for header in (auth("k2", "new"), auth("k2")):
        assert (await ring.check(header)).id == "k2"
    bus.keys.records["k2"] = msgspec.structs.replace(new, previous_until=int(time.time()) - 1)
    assert (await ring.check(auth("k2", "new"))).id == "k2"
    with pytest.raises(ClientFault, match="was replaced"):
        await ring.check(auth("k2"))
    bus.keys.records["k2"] = msgspec.structs.replace(new, previous_hash="")
    with pytest.raises(ClientFault, match="not known"):
        await ring.check(auth("k2"))
    with pytest.raises(ClientFault, match="not known"):  # no previous secret is no open door
        await ring.check(auth("k2", "no such key"))


async def test_concurrent_lookups_are_one_and_survive_an_impatient_client(bus: Any, auth: Any) -> None:
    gate, read = asyncio.Event(), bus.keys.get

    async def slow(key: str) -> Any:
        await gate.wait()
        return await read(key)

    bus.keys.get = slow
    ring = KeyRing(bus.keys)
    waiting = [asyncio.create_task(ring.check(auth())) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert [r.id for r in results[1:]] == ["k1"] * 4
    assert bus.keys.reads == 1


@pytest.mark.parametrize(("methods", "allowed"), [
    (("*",), True), (("classify",), True), (("embed", "classify"), True), (("embed",), False), (("server/1",), False), ((), False),
])  # fmt: skip
def test_methods(new_key: Any, methods: tuple[str, ...], allowed: bool) -> None:
    key = new_key(methods=methods)
    if allowed:
        grant(key, method_of(Server.classify), "news")
        return
    with pytest.raises(ClientFault) as caught:
        grant(key, method_of(Server.classify), "news")
    assert caught.value.http_status == 403


def test_models(new_key: Any) -> None:
    key = new_key(models=("news",))
    grant(key, method_of(Server.classify), "news")
    grant(key, method_of(Jobs.find))
    with pytest.raises(ClientFault, match="may not use model 'spam', only news"):
        grant(key, method_of(Server.classify), "spam")
    assert sees(key, "news")
    assert not sees(key, "spam")
