"""An administrator's key manages plugins and pools over gRPC and HTTP, with a real kernel; other keys are told that they may
not, and the record of a swap says whose key it was."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import msgspec
import pytest
from google.protobuf import json_format, message_factory

from kernelm.testing.harness import System, until
from kernelm_authority.identity import Grant
from kernelm_gateway import protobuf
from kernelm_gateway.gate import MANAGEABLE, ON_BEHALF, Gate
from kernelm_gateway.messages import Codec
from kernelm_gateway.service import Announcement
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import (
    Artifacts,
    Bounds,
    Empty,
    Kernel,
    Key,
    KeyList,
    KeyRequest,
    LoadedPlugin,
    LoadRequest,
    Manifest,
    PoolSpec,
    ProbeCall,
    PutArtifact,
    Swap,
    SystemState,
)

DIGEST = "sha256:" + "ab" * 32
POOL = protobuf.make_pool([protobuf.describe(c) for c in CONTRACTS.values() if protobuf.callable_methods(c)])


CODE = """
import msgspec
from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.plugin import Plugin

class Word(msgspec.Struct):
    word: str = ""

class Settings(msgspec.Struct, forbid_unknown_fields=True):
    word: str = "hello"
    times: int = 1

class Greet(Contract, name="greet", major=1):
    @unary
    async def hello(self, request: Word, call: object) -> Word: ...

class Greeter(Plugin, Greet):
    Settings = Settings
    async def hello(self, request: Word, call: object) -> Word:
        return Word(self.settings.word * self.settings.times)
"""
TEXT = 'name = "greet"\nversion = "1"\nsummary = "says hello"\ncontracts = ["greet/1"]\nentry = "greet_plugin:Greeter"\n'
JOINING = ("enroll", "renew", "hello", "ready", "exited", "create-key", "rotate-key", "revoke-key", "forget-machine")


def test_what_joins_the_system_or_makes_keys_is_open_to_no_key(gate: Gate, new_key: Any) -> None:
    every = Kernel.methods
    assert {m.name for m in MANAGEABLE} | set(JOINING) == set(every)
    for name in JOINING:
        with pytest.raises(ClientFault, match="not open to API keys"):
            gate.admit(new_key(admin=True), every[name])
    for method in MANAGEABLE:
        gate.admit(new_key(admin=True), method)
        with pytest.raises(ClientFault, match="may not manage the system") as caught:
            gate.admit(new_key(), method)
        assert "--admin" in caught.value.remedy
    with pytest.raises(ClientFault, match="only rollback"):
        gate.admit(new_key(admin=True, methods=("rollback",)), every["load"])


async def test_keys_are_listed_without_their_hashes_and_the_kernel_is_told_for_whom(gate: Gate, bus: Any, new_key: Any) -> None:
    bus.answers["kernel/1.list-keys"] = lambda *_: KeyList((Key("a", "a", "hash", (), (), "t", 1, previous_hash="older"),))
    listed = await gate.call(new_key("k9", admin=True), Kernel.methods["list-keys"], Empty())
    assert [(k.id, k.hash, k.previous_hash) for k in listed.keys] == [("a", "", "")]
    assert bus.headers == {"Kernelm-On-Behalf": "key-k9"}


def through_protobuf(struct: Any) -> Any:
    """The struct as it comes back from the wire of `kernel.v1`."""
    described = POOL.FindMessageTypeByName(f"kernelm.kernel.v1.{type(struct).__name__}")
    codec = Codec(type(struct), message_factory.GetMessageClass(described))
    return codec.read(codec.message.FromString(codec.write(struct).SerializeToString()))


def test_what_a_swap_is_made_of_comes_through_protobuf_unchanged() -> None:
    probe = ProbeCall("greet/1.hello", {"word": "x", "deep": [{"n": 1}]})
    manifest = Manifest("greet", "1", "s", ("greet/1",), "m:C", probe=probe, drain_s=0.0, default=False)
    spec = PoolSpec("greet-g2", "greet", 0, True, settings={"a": {"b": None}}, artifacts=(DIGEST,), parked=True)
    swap = Swap("s", "b", "", (), "watching", "key-1", "", 1.5, bounds=Bounds(watch_s=0.0, min_calls=0))
    state = SystemState((), (spec,), (), 3, {"routes": "in force"}, (LoadedPlugin(manifest, DIGEST),), (swap,))
    assert through_protobuf(state) == state
    for settings in (None, {}, {"word": "hi"}):
        request = LoadRequest(replaces="greet/1", settings=settings, instances=0, canary=0, bounds=Bounds(watch_s=0.0))
        assert through_protobuf(request) == request


@pytest.fixture
async def served() -> AsyncIterator[SimpleNamespace]:
    async with System() as system:
        await system.service("artifacts")
        await system.service("node")
        await system.service("gateway", KERNELM_HTTP_PORT="0", KERNELM_GRPC_PORT="0")
        where = msgspec.json.decode((system.home / "run" / "gateway.json").read_bytes(), type=Announcement)
        async with grpc.aio.insecure_channel(where.grpc) as channel:
            async def call(secret: str, method: str, **fields: Any) -> dict[str, Any]:
                described = POOL.FindServiceByName("kernelm.kernel.v1.Kernel").methods_by_name[method]
                taken, given = map(message_factory.GetMessageClass, (described.input_type, described.output_type))
                stub = channel.unary_unary(f"/kernelm.kernel.v1.Kernel/{method}", taken.SerializeToString, given.FromString)
                request = json_format.ParseDict(fields, taken())
                reply = await stub(request, metadata=(("authorization", f"Bearer {secret}"),), timeout=60)
                return json_format.MessageToDict(reply, preserving_proto_field_name=True)

            yield SimpleNamespace(system=system, call=call, http=where.http)


async def stored(system: System, folder: Path) -> str:
    folder.mkdir()
    (folder / "kernelm-plugin.toml").write_text(TEXT)
    (folder / "greet_plugin.py").write_text(CODE)
    artifact = await system.admin.call(Artifacts.put, PutArtifact(str(folder), "plugin"))
    return str(artifact.digest)


async def over(system: System, swap: str) -> Swap:
    async def ended() -> Swap | None:
        swaps = (await system.state()).swaps
        return next((s for s in swaps if s.id == swap and s.over), None)

    found: Swap = await until(ended, 90.0, f"the end of swap {swap}")
    return found


async def said(system: System) -> str:
    msg = await system.admin.request("svc.greet.v1.hello.admin", b"{}", 10.0)
    return str(msgspec.json.decode(msg.data)["word"])


async def test_a_swap_over_grpc_and_http_tells_whose_key_it_was(served: SimpleNamespace, tmp_path: Path) -> None:
    system, call = served.system, served.call
    digest = await stored(system, tmp_path / "plugin")
    admin = await system.admin.call(Kernel.create_key, KeyRequest("deployer", admin=True))
    assert admin.key.admin
    plain = await system.admin.call(Kernel.create_key, KeyRequest("reader"))

    with pytest.raises(grpc.aio.AioRpcError) as denied:
        await call(plain.secret, "Load", manifest=TEXT, source=digest)
    assert denied.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert plain.key.id in str(denied.value.details())
    for method in ("Enroll", "CreateKey"):
        with pytest.raises(grpc.aio.AioRpcError) as closed:
            await call(admin.secret, method)
        assert closed.value.code() == grpc.StatusCode.PERMISSION_DENIED, method

    first = await call(admin.secret, "Load", manifest=TEXT, source=digest, why="try it")
    done = await over(system, first["id"])
    assert (done.phase, done.why) == ("done", "try it"), done.outcome
    assert done.by == f"key-{admin.key.id}"
    assert await said(system) == "hello"

    bounds = {"watch_s": 0.0}
    second = await call(admin.secret, "Load", replaces="greet/1", settings={"word": "hi", "times": 2}, bounds=bounds)
    assert (await over(system, second["id"])).phase == "done"
    assert await said(system) == "hihi", "nested settings and a watch of 0 come through protobuf as they are"
    state = await call(admin.secret, "State")
    assert [s["id"] for s in state["swaps"]] == [first["id"], second["id"]]
    assert [p["manifest"]["name"] for p in state["plugins"] if p.get("source")] == ["greet"]

    async with httpx.AsyncClient(base_url=served.http, headers={"Authorization": f"Bearer {admin.secret}"}, timeout=60) as client:
        back = await client.post("/v1/kernel/rollback", json={"pool": "greet/1", "why": "no"})
        assert back.status_code == 200, back.text
        assert (await over(system, back.json()["id"])).phase == "done"
        assert await said(system) == "hello"
        keys = await client.get("/v1/kernel/list-keys")
        assert {k["hash"] for k in keys.json()["keys"]} == {""}
        client.headers["Authorization"] = f"Bearer {plain.secret}"
        refused = await client.post("/v1/kernel/unload", json={"pool": "greet/1"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
        assert "kernelm key create" in refused.json()["error"]["remedy"]


async def test_only_a_service_is_believed_for_whom_it_acts(served: SimpleNamespace, tmp_path: Path) -> None:
    system = served.system
    digest = await stored(system, tmp_path / "plugin")
    mallory = await system.connect("mallory", Grant("plugin", "mallory", "mallory", "mallory", calls=("kernel/1",)))
    swap = await mallory.call(Kernel.load, LoadRequest(manifest=TEXT, source=digest), headers={ON_BEHALF: "key-innocent"})
    assert swap.by == "mallory"
    assert (await over(system, swap.id)).phase == "done"
