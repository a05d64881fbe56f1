"""A bus in memory: calls go through JSON as on the real one, and `answers` holds what each method answers.

The real broker, kernel and gateway process are in test_system.py."""

import hashlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from kernelm_contracts.jobs import JobList, JobRecord, Jobs, JobSpec, RunRecord, RunSpec, RunView
from kernelm_contracts.server import ClassifyReply, EmbedReply, Label, Server
from kernelm_gateway.gate import Gate
from kernelm_gateway.settings import GatewaySettings
from kernelm_sdk.contract import Method, method_of
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Destination, Instance, Kernel, Key, Route, SystemState

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


class FakeBus:
    """`answers`: "contract/major.method" -> function of the request (a list of frames for a streamed one)."""

    connected = True

    def __init__(self) -> None:
        self.keys = FakeBucket({"k1": make_key()})
        self.answers: dict[str, Callable[[Any, str], Any]] = {}
        self.calls: list[tuple[str, str, Any, float]] = []  # method, model, request as it arrived, timeout in s
        self.headers: dict[str, str] | None = None  # of the last call

    def bucket(self, name: str, kind: type) -> FakeBucket:
        assert (name, kind) == ("keys", Key)
        return self.keys

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
                   headers: dict[str, str] | None = None) -> Any:  # fmt: skip
        self.headers = headers
        method, answer = self._answer(declared, request, model, timeout_s)
        return msgspec.json.decode(msgspec.json.encode(answer), type=method.reply)

    async def stream(self, declared: Any, request: msgspec.Struct, *, model: str = "", idle_s: float = 30.0) -> AsyncIterator[Any]:
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


def record(identifier: str, tenant: str) -> JobRecord:
    spec = JobSpec("train", "trainer/1.train", {"epochs": 2, "note": None}, tenant=tenant)
    return JobRecord(identifier, spec, "key", "running", 2)


def view(identifier: str, state: Any = "running") -> RunView:
    tenant = "acme" if identifier.startswith("mine") else "other"
    run = RunRecord(identifier, RunSpec("news", (), tenant), {"train": "j1"}, state, submitted=time.time())
    return RunView(run, (record("j1", tenant),))


@pytest.fixture
def bus() -> FakeBus:
    fake = FakeBus()
    instances = (Instance("e-0", "encoder", "1", "news-g3", "local", "ready"),
                 Instance("s-0", "scheduler", "1", "scheduler", "local", "ready"))  # fmt: skip
    routes = (Route("news", "model", (Destination("news-g3", 100),), 3, DIGEST),
              Route("gone", "model", (Destination("x", 100),), 1, DIGEST),
              Route("data/1", "svc", (Destination("data", 100),)))  # fmt: skip
    state = SystemState(instances, (), routes, 1)
    fake.answers = {
        f"{method_of(m).contract.id()}.{method_of(m).name}": answer for m, answer in {
            Server.classify: _classify, Server.embed: _embed, Kernel.state: lambda *_: state,
            Jobs.find: lambda *_: JobList((record("j1", "acme"), record("j2", "other"))),
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
def auth() -> Callable[..., str]:
    return bearer


@pytest.fixture
def new_key() -> Callable[..., Key]:
    return make_key
