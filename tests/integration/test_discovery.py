"""Members answer NATS' own discovery, and only who may ask is answered."""

import asyncio
from typing import Any

import msgspec
import pytest

from kernelm.testing.harness import System, until
from kernelm_authority.identity import Grant
from kernelm_sdk.contract import Contract, model_unary, unary
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Manifest, Plugin


class FoundText(msgspec.Struct, frozen=True):
    text: str


class Findable(Contract, name="findable", major=1):
    @unary
    async def say(self, request: FoundText, call: Any) -> FoundText: ...
    @model_unary
    async def ask(self, request: FoundText, call: Any) -> FoundText: ...


class FindablePlugin(Plugin, Findable):
    async def say(self, request: FoundText, call: Any) -> FoundText:
        return request

    async def ask(self, request: FoundText, call: Any) -> FoundText:
        return request

    def models(self) -> tuple[str, ...]:
        return ("news",)


@pytest.fixture
async def system():
    async with System() as system:
        for name in ("a", "b"):
            manifest = Manifest("findable", "1.2.0", "", ("findable/1",), "x:Y")
            await system.plugin(FindablePlugin, manifest, instance=f"findable-{name}")
        yield system


async def asked(system: System, subject: str, count: int) -> list[dict]:
    """The first `count` answers, as a stock client gets them."""
    answers: list[dict] = []
    link = system.admin._link

    async def note(msg: Any) -> None:
        answers.append(msgspec.json.decode(msg.data))

    inbox = f"{link.inbox}.found.{len(subject)}"
    subscription = await link.client.subscribe(inbox, cb=note)
    await link.client.publish(subject, b"", reply=inbox)
    await until(lambda: len(answers) >= count, 10, f"{count} answers to {subject}")
    await subscription.unsubscribe()
    return sorted(answers, key=lambda a: a["id"])


async def test_members_are_listed_with_their_endpoints_and_counters(system: System) -> None:
    pings = await asked(system, "$SRV.PING.findable", 2)
    assert [(p["name"], p["id"], p["version"], p["type"]) for p in pings] == [
        ("findable", f"findable-{x}", "1.2.0", "io.nats.micro.v1.ping_response") for x in "ab"
    ]
    (info,) = await asked(system, "$SRV.INFO.findable.findable-a", 1)
    subjects = {e["subject"]: e["queue_group"] for e in info["endpoints"]}
    assert subjects.items() >= {"svc.findable.v1.say.*": "findable", "model.news.ask.*": "findable"}.items()
    for _ in range(5):
        await system.admin.call(Findable.say, FoundText("x"), instance="findable-b")
    (stats,) = await asked(system, "$SRV.STATS.findable.findable-b", 1)
    assert (sum(e["num_requests"] for e in stats["endpoints"]), sum(e["num_errors"] for e in stats["endpoints"])) == (5, 0)
    assert stats["started"].endswith("Z")


async def test_a_client_that_may_call_models_may_not_look_around(system: System) -> None:
    client = await system.connect("key-1", Grant("client", "key-1", models=("news",)))
    with pytest.raises(ClientFault) as caught:
        await asyncio.wait_for(client.request("$SRV.PING", b"", 30.0), 60)
    assert caught.value.code == "permission_denied"
