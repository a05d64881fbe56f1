"""The gateway as it runs: a real broker, a real kernel, the gateway in a process of its own, a server plugin behind a route."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import msgspec
import pytest
from google.protobuf import message_factory

from kernelm.testing.harness import System, until
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Label, ServedModel, Server
from kernelm_gateway import protobuf
from kernelm_gateway.service import Announcement
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import Manifest, Plugin
from kernelm_sdk.system import Destination, Kernel, KeyName, KeyRequest, Route

DIGEST = "sha256:" + "cd" * 32


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: ServedModel


class LongestWord(Plugin, Server):
    """A server whose answer depends on the text: its label is the longest word, its score that word's share."""

    Settings = Settings

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,)

    async def classify(self, request: ClassifyRequest, call: Any) -> ClassifyReply:
        if call.caller != "gateway":
            raise ClientFault("permission_denied", f"expected the gateway, not {call.caller}")
        words = [sorted(text.split(), key=len)[-1] for text in request.input]
        rows = tuple((Label(word, len(word) / len(text)),) for word, text in zip(words, request.input, strict=True))
        served = self.settings.model
        return ClassifyReply(served.name, served.generation, served.artifact, rows, sum(len(t.split()) for t in request.input), 0.1)


class Starting(LongestWord):
    """In the place of whoever starts an instance for a call: says so for as long as a test wants."""

    left = 3

    async def classify(self, request: ClassifyRequest, call: Any) -> ClassifyReply:
        if Starting.left > 0:
            Starting.left -= 1
            raise KernelFault("starting", "it had no calls for a while", "call again", retriable=True, retry_after_s=4.0)
        return await super().classify(request, call)


MANIFEST = Manifest("longest-word", "1", "labels a text with its longest word", ("server/1",), f"{__name__}:LongestWord")


@pytest.fixture
async def system() -> AsyncIterator[System]:
    async with System() as system:
        model = {"name": "news", "artifact": DIGEST, "generation": 7}
        await system.plugin(LongestWord, MANIFEST, pool="news-g7", settings={"model": model})
        await system.admin.call(Kernel.set_route, Route("news", "model", (Destination("news-g7", 100),), 7, DIGEST))
        await system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0", KERNELM_START_WAIT_S="2")
        yield system


def announced(system: System) -> Announcement:
    return msgspec.json.decode((system.home / "run" / "gateway.json").read_bytes(), type=Announcement)


async def classify_by_grpc(address: str, key: str, text: str) -> Any:
    contract = CONTRACTS["server/1"]
    pool = protobuf.make_pool([protobuf.describe(contract)])
    method = pool.FindServiceByName("kernelm.server.v1.Server").methods_by_name["Classify"]
    taken, given = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = channel.unary_unary("/kernelm.server.v1.Server/Classify", taken.SerializeToString, given.FromString)
        return await stub(taken(input=[text], model="news"), metadata=(("authorization", f"Bearer {key}"),), timeout=10)


async def test_one_article_over_http_and_grpc_and_a_revoked_key(system: System) -> None:
    created = await system.admin.call(Kernel.create_key, KeyRequest("reader", ("news",), ("classify",)))
    where, text = announced(system), "shares rose after the announcement"
    async with httpx.AsyncClient(base_url=where.http, headers={"Authorization": f"Bearer {created.secret}"}) as client:
        assert (await client.get("/healthz")).status_code == 200
        over_http = await client.post("/v1/classify", json={"model": "news", "input": text})
        assert over_http.status_code == 200, over_http.text
        answer = over_http.json()
        assert (answer["results"][0][0]["label"], answer["generation"], answer["artifact"]) == ("announcement", 7, DIGEST)
        over_grpc = await classify_by_grpc(where.grpc, created.secret, text)
        assert (over_grpc.results[0].values[0].label, over_grpc.generation, over_grpc.artifact) == ("announcement", 7, DIGEST)
        assert over_grpc.results[0].values[0].score == answer["results"][0][0]["score"]
        assert (await client.get("/v1/usage")).status_code == 503, "there is no job table here"
        assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == ["news"]

        embedded = await client.post("/v1/embeddings", json={"model": "news", "input": text})
        assert embedded.status_code == 403, "the key was granted classify only"
        unknown = await client.post("/v1/classify", json={"model": "weather", "input": text})
        assert unknown.status_code == 403, "nor another model"

        await system.admin.call(Kernel.revoke_key, KeyName(created.key.id))

        async def shut_out() -> bool:
            return (await client.post("/v1/classify", json={"model": "news", "input": text})).status_code == 401

        await until(shut_out, 10.0, "the revocation")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await classify_by_grpc(where.grpc, created.secret, text)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_an_unknown_model_an_unsupported_method_and_too_much_for_the_broker(system: System) -> None:
    created = await system.admin.call(Kernel.create_key, KeyRequest("all"))
    async with httpx.AsyncClient(base_url=announced(system).http, headers={"Authorization": f"Bearer {created.secret}"}) as client:
        unknown = await client.post("/v1/classify", json={"model": "weather", "input": "a"})
        assert (unknown.status_code, unknown.json()["error"]["remedy"]) == (404, "deployments are: news")
        unsupported = await client.post("/v1/embeddings", json={"model": "news", "input": "a"})
        error = unsupported.json()["error"]
        assert (unsupported.status_code, error["code"], error["param"]) == (501, "unsupported_method", "model")
        assert ("impl." not in unsupported.text, bool(error["remedy"]), error["type"]) == (True, True, "invalid_request_error")
        large = await client.post("/v1/classify", json={"model": "news", "input": "word " * 400_000})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
        assert "1 MB" in large.json()["error"]["message"]
        assert "artifact" not in large.text  # a client over HTTP can store none


async def test_a_model_that_is_being_started_for_a_call_is_waited_for(system: System) -> None:
    model = {"name": "asleep", "artifact": DIGEST, "generation": 1}
    await system.plugin(Starting, MANIFEST, pool="asleep-g1", settings={"model": model})
    await system.admin.call(Kernel.set_route, Route("asleep", "model", (Destination("asleep-g1", 100),), 1, DIGEST))
    created = await system.admin.call(Kernel.create_key, KeyRequest("all"))
    where, body = announced(system), {"model": "asleep", "input": "a longer word"}
    async with httpx.AsyncClient(base_url=where.http, headers={"Authorization": f"Bearer {created.secret}"}, timeout=30) as client:
        Starting.left = 3
        answer = await client.post("/v1/classify", json=body)
        assert (answer.status_code, Starting.left) == (200, 0), answer.text
        Starting.left = 1_000_000  # longer than the gateway waits
        refused = await client.post("/v1/classify", json=body)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "4")
        assert refused.json()["error"]["code"] == "starting"


async def test_without_a_broker_it_says_so_and_comes_back(system: System) -> None:
    created = await system.admin.call(Kernel.create_key, KeyRequest("all"))
    async with httpx.AsyncClient(base_url=announced(system).http, headers={"Authorization": f"Bearer {created.secret}"}) as client:
        async def health(wanted: int) -> bool:
            return (await client.get("/healthz")).status_code == wanted

        system.processes["broker"].kill()
        await asyncio.to_thread(system.processes["broker"].wait)
        await until(lambda: health(503), 10.0, "not healthy")
        assert (await client.post("/v1/classify", json={"model": "news", "input": "a"})).status_code == 503
        system.start_broker()
        await until(lambda: health(200), 20.0, "healthy again")

        async def answers() -> bool:
            return (await client.post("/v1/classify", json={"model": "news", "input": "a"})).status_code == 200

        await until(answers, 20.0, "answering again")
