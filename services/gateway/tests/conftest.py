"""A bus in memory: calls go through JSON as on the real one, and `answers` holds what each method answers.

The real broker, kernel and gateway process are in test_system.py."""

import hashlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec
import pytest

from kernelm_contracts.data import Data, Redacted, RedactedPart, RedactState
from kernelm_contracts.jobs import JobList, JobRecord, Jobs, JobSpec, RunRecord, RunSpec, RunView
from kernelm_contracts.retriever import AnswerFrame, RecommendReply, Retriever, SearchReply, Source
from kernelm_contracts.server import ClassifyReply, EmbedReply, GenerateFrame, Label, Server, Usage
from kernelm_contracts.shadows import Shadow
from kernelm_contracts.usage import CallUsage, DayUsage, HeldUsage, TenantUsage, UsageReport
from kernelm_gateway.gate import Gate
from kernelm_gateway.http_api import make_app
from kernelm_gateway.settings import GatewaySettings
from kernelm_sdk.contract import Method, method_of
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Destination, Instance, Kernel, Key, Route, SystemState
from kernelm_sdk.usage import Meter

USED = TenantUsage({"news": CallUsage(2, 1, 30, 4)}, {"jobs": HeldUsage(7.5, 100.0, 1.0)})
DIGEST = "sha256:" + "ab" * 32
SECRET = "s3cret_with-all_sorts-of-signs"


def make_key(identifier: str = "k1", **fields: Any) -> Key:
    given = {"models": ("*",), "methods": ("*",), "tenant": "acme", "created": 1, **fields}
    return Key(identifier, "test", hashlib.sha256(SECRET.encode()).hexdigest(), **given)


def bearer(identifier: str = "k1", secret: str = SECRET) -> str:
    return f"Bearer km_{identifier}_{secret}"


class FakeBucket:
    def __init__(self, records: dict[str, Any]) -> None:
        self.records, self.reads = records, 0

    async def get(self, key: str) -> tuple[Any, int]:
        self.reads += 1
        return self.records.get(key), 1

    async def all(self, prefix: str) -> dict[str, tuple[Any, int]]:
        return {key: (record, 1) for key, record in self.records.items() if key.startswith(f"{prefix}.")}


class FakeSubscription:
    async def unsubscribe(self) -> None: ...


class FakeBus:
    """`answers`: "contract/major.method" -> function of the request (a list of frames for a streamed one)."""

    connected = True

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}  # pattern -> who follows it
        self.instances: list[str] = []  # that were called by name
        self.keys = FakeBucket({"k1": make_key()})
        self.deployments = FakeBucket({})
        self.answers: dict[str, Callable[[Any, str], Any]] = {}
        self.calls: list[tuple[str, str, Any, float]] = []  # method, model, request as it arrived, timeout in s
        self.headers: dict[str, str] | None = None  # of the last call
        self.meter = Meter()

    @property
    def of_models(self) -> list[Any]:
        """The calls of models; what the gateway asks for itself is none of the caller's."""
        return [call for call in self.calls if call[1]]

    async def follow(self, handler: Any, pattern: str = "evt.>") -> Any:
        self.handlers[pattern] = handler
        return FakeSubscription()

    def bucket(self, name: str, kind: type) -> FakeBucket:
        assert (name, kind) in (("keys", Key), ("deployments", Shadow))
        return self.keys if name == "keys" else self.deployments

    def _answer(self, declared: Any, request: msgspec.Struct, model: str, timeout_s: float) -> tuple[Method, Any]:
        method = declared if isinstance(declared, Method) else method_of(declared)
        name = f"{method.contract.id()}.{method.name}"
        arrived = msgspec.json.decode(msgspec.json.encode(request), type=method.request)
        self.calls.append((name, model, arrived, timeout_s))
        answer = self.answers[name](arrived, model)
        if isinstance(answer, Fault):
            raise answer
        return method, answer

    async def call(self, declared: Any, request: msgspec.Struct, *, model: str = "", timeout_s: float = 30.0,
                   headers: dict[str, str] | None = None, instance: str = "") -> Any:  # fmt: skip
        self.headers = headers
        self.instances += [instance] if instance else []
        method, answer = self._answer(declared, request, model, timeout_s)
        return msgspec.json.decode(msgspec.json.encode(answer), type=method.reply)

    async def stream(self, declared: Any, request: msgspec.Struct, *, model: str = "", idle_s: float = 30.0,
                     instance: str = "", headers: dict[str, str] | None = None) -> AsyncIterator[Any]:  # fmt: skip
        self.headers = headers
        self.instances += [instance] if instance else []
        _, frames = self._answer(declared, request, model, idle_s)
        for frame in frames:
            if isinstance(frame, Fault):
                raise frame
            yield frame


def _classify(request: Any, model: str) -> Any:
    if model == "gone":
        return KernelFault("no_responders", "nobody answers on model.gone.classify.gateway", retriable=True)
    if model == "busy":
        return ClientFault("busy", "16 calls wait", "call again later", retriable=True, retry_after_s=7)
    if model == "buggy":
        raise RuntimeError("secret detail")
    if request.at_least > 3:
        return ClientFault("stale_generation", "generation 3 is older than asked for")
    row = (Label("sport", 0.75), Label("business", 0.25))[: request.top or None]
    return ClassifyReply(model, 3, DIGEST, tuple(row for _ in request.input), 5 * len(request.input), 1.5)


def _embed(request: Any, model: str) -> Any:
    return EmbedReply(model, 3, DIGEST, tuple((0.6, -0.8) for _ in request.input), 4, 1.0)


def _generate(request: Any, model: str) -> Any:
    if model == "gone":
        return KernelFault("no_responders", "nobody answers on model.gone.generate.gateway", retriable=True)
    frames = [GenerateFrame(f"w{k}") for k in range(2)]
    return [*frames, GenerateFrame("", "stop", Usage(3, 2), model, 3, DIGEST)]


FOUND = (Source("news/1", "Ada won", "Ada has won in Paris.", 0.7),)
ENDED = AnswerFrame(finish_reason="stop", usage=Usage(40, 5), model="news", generation=3, artifact=DIGEST, generator=DIGEST)
ANSWERED = (AnswerFrame(FOUND), AnswerFrame(text="In Paris "), AnswerFrame(text="[1]."), ENDED)


def record(identifier: str, tenant: str) -> JobRecord:
    spec = JobSpec("train", "trainer/1.train", {"epochs": 2, "note": None}, tenant=tenant)
    return JobRecord(identifier, spec, "key", "running", 2)


def view(identifier: str, state: Any = "running") -> RunView:
    tenant = "acme" if identifier.startswith("mine") else "other"
    run = RunRecord(identifier, RunSpec("news", (), tenant), {"train": "j1"}, state, submitted=time.time())
    return RunView(run, (record("j1", tenant),))


@pytest.fixture(scope="session")
def make_bus() -> Callable[[], FakeBus]:
    return _bus


@pytest.fixture
def bus() -> FakeBus:
    return _bus()


def _bus() -> FakeBus:
    fake = FakeBus()
    instances = (Instance("e-0", "encoder", "1", "news-g3", "local", "ready"),
                 Instance("s-0", "scheduler", "1", "scheduler", "local", "ready"))  # fmt: skip
    routes = (Route("news", "model", (Destination("news-g3", 100),), 3, DIGEST),
              Route("gone", "model", (Destination("x", 100),), 1, DIGEST),
              Route("data/1", "svc", (Destination("data", 100),)))  # fmt: skip
    state = SystemState(instances, (), routes, 1)
    fake.answers = {
        f"{method_of(m).contract.id()}.{method_of(m).name}": answer for m, answer in {
            Server.classify: _classify, Server.embed: _embed, Server.generate: _generate,
            Retriever.search: lambda _, model: SearchReply(model, 3, DIGEST, FOUND, 1.0),
            Retriever.recommend: lambda _, model: RecommendReply(model, 3, DIGEST, FOUND, 1.0),
            Retriever.answer: lambda *_: list(ANSWERED), Kernel.state: lambda *_: state,
            Data.redact: lambda request, _: Redacted(request.texts, ({},) * len(request.texts)),
            Data.redact_part: lambda request, _: RedactedPart(request.text, RedactState()),
            Jobs.submit: lambda request, _: JobRecord("new", request, "key"),
            Jobs.cancel: lambda request, _: record(request.id, "acme"),
            Jobs.submit_run: lambda request, _: RunRecord("new", request),
            Jobs.cancel_run: lambda request, _: view(request.id, "cancelled").run,
            Jobs.usage: lambda request, _: UsageReport((DayUsage("2026-11-28", request.tenant, USED),)),
            Jobs.find: lambda *_: JobList((record("j1", "acme"), record("j2", "other")), 1),
            Jobs.get: lambda request, _: record(request.id, "acme" if request.id == "j1" else "other"),
            Jobs.get_run: lambda request, _: view(request.id),
            Jobs.follow_run: lambda request, _: [view(request.id), view(request.id, "done")],
        }.items()
    }  # fmt: skip
    return fake


@pytest.fixture
def gate(bus: FakeBus) -> Gate:
    return Gate(bus, GatewaySettings(http_port=0, grpc_port=0))


@pytest.fixture
async def client(gate: Any, auth: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(gate))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers={"Authorization": auth()}) as client:
        yield client


@pytest.fixture
def auth() -> Callable[..., str]:
    return bearer


@pytest.fixture
def new_key() -> Callable[..., Key]:
    return make_key
