"""gRPC through a real channel: stubs that are made from reflection alone, as a stranger would."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from kernelm_gateway.grpc_api import start_grpc
from kernelm_sdk.errors import ClientFault

SERVER, JOBS = "kernelm.server.v1.Server", "kernelm.jobs.v1.Jobs"


@pytest.fixture
async def client(gate: Any, auth: Any) -> AsyncIterator[SimpleNamespace]:
    server, port = await start_grpc(gate, "127.0.0.1", 0)
    address = f"127.0.0.1:{port}"

    def reflect() -> tuple[Any, set[str]]:
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = descriptor_pool.DescriptorPool(database)
            for service in (SERVER, JOBS, "kernelm.kernel.v1.Kernel"):
                pool.FindServiceByName(service)  # loads the file while the channel is open
            return pool, set(database.get_services())

    pool, services = await asyncio.to_thread(reflect)
    async with grpc.aio.insecure_channel(address) as channel:
        def call(service: str, method: str, key: str = auth(), timeout: float = 10.0, **fields: Any) -> Any:
            described = pool.FindServiceByName(service).methods_by_name[method]
            taken, given = map(message_factory.GetMessageClass, (described.input_type, described.output_type))
            make = channel.unary_stream if described.server_streaming else channel.unary_unary
            stub = make(f"/{service}/{method}", taken.SerializeToString, given.FromString)
            return stub(taken(**fields), metadata=(("authorization", key),) if key else (), timeout=timeout)

        yield SimpleNamespace(call=call, services=services, channel=channel, address=address, port=port)
    await server.stop(None)


async def refused(call: Any) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo, list[str]]:
    """The code, ErrorInfo and names of the other details of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert "Traceback" not in (caught.value.details() or "")
    status = rpc_status.from_call(SimpleNamespace(
        code=caught.value.code, details=caught.value.details, trailing_metadata=caught.value.trailing_metadata))  # fmt: skip
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return caught.value.code(), info, [d.TypeName() for d in status.details[1:]]


async def test_classify(client: SimpleNamespace, bus: Any) -> None:
    reply = await client.call(SERVER, "Classify", input=["a", "b"], model="news", top=1, timeout=100.0)
    assert (reply.model, reply.generation, reply.artifact) == ("news", 3, "sha256:" + "ab" * 32)
    assert [[(x.label, x.score) for x in row.values] for row in reply.results] == [[("sport", 0.75)]] * 2
    name, model, request, timeout_s = bus.calls[-1]
    assert (name, model, request.input, request.top, request.at_least) == ("server/1.classify", "news", ("a", "b"), 1, 0)
    assert 50.0 < timeout_s < 102.0, "the client's deadline goes with the call"  # which rounds it up to three digits


async def test_embed_and_usage(client: SimpleNamespace, gate: Any) -> None:
    reply = await client.call(SERVER, "Embed", input=["a"], model="news")
    assert list(reply.embeddings[0].values) == [0.6, -0.8]
    row = gate.bus.meter._rows["", "acme", "news"]
    assert (row.calls, row.input_tokens) == (1, 4)


async def test_jobs_are_the_tenants_own(client: SimpleNamespace) -> None:
    job = await client.call(JOBS, "Get", id="j1")
    assert (job.state, job.spec.request["epochs"], job.progress.deadline_s) == ("running", 2, 600.0)
    assert [j.id for j in (await client.call(JOBS, "Find")).jobs] == ["j1"]
    code, info, _ = await refused(client.call(JOBS, "Get", id="j2"))
    assert (code, info.metadata["code"]) == (grpc.StatusCode.NOT_FOUND, "not_found")


async def test_a_stream(client: SimpleNamespace) -> None:
    frames = [view.run.state async for view in client.call(JOBS, "FollowRun", id="mine-1")]
    assert frames == ["running", "done"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [view async for view in client.call(JOBS, "FollowRun", id="theirs-1")]
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("key", ["", "Bearer km_k1_wrong", "Bearer km_old_x"])
async def test_wrong_keys(client: SimpleNamespace, bus: Any, key: str) -> None:
    code, info, _ = await refused(client.call(SERVER, "Classify", key, input=["a"], model="news"))
    assert (code, info.reason, info.domain, info.metadata["whose"]) == (
        grpc.StatusCode.UNAUTHENTICATED, "UNAUTHORIZED", "kernelm", "client")  # fmt: skip
    assert "kernelm key create" in info.metadata["remedy"]
    assert bus.calls == []


async def test_revoked_and_expired(client: SimpleNamespace, bus: Any, auth: Any, new_key: Any) -> None:
    bus.keys.records |= {"bad": new_key("bad", revoked=True), "old": new_key("old", expires=1)}
    for identifier in ("bad", "old"):
        code, _, _ = await refused(client.call(SERVER, "Classify", auth(identifier), input=["a"], model="news"))
        assert code == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(("service", "method"), [
    ("kernelm.kernel.v1.Kernel", "State"), ("kernelm.kernel.v1.Kernel", "ListKeys"), (JOBS, "SubmitRun"), (JOBS, "Cancel"),
])  # fmt: skip
async def test_the_system_is_not_open_to_api_keys(client: SimpleNamespace, bus: Any, service: str, method: str) -> None:
    fields = {"name": "x", "stage": []} if method == "SubmitRun" else {}
    code, info, _ = await refused(client.call(service, method, **fields))
    assert (code, info.metadata["code"]) == (grpc.StatusCode.PERMISSION_DENIED, "permission_denied")
    assert bus.calls == []


@pytest.mark.parametrize(("fields", "code", "reason", "more"), [
    ({"model": ""}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID", []),
    ({"model": "a.b"}, grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", []),
    ({"model": "gone"}, grpc.StatusCode.UNAVAILABLE, "NOT_READY", ["google.rpc.RetryInfo"]),
    ({"model": "busy"}, grpc.StatusCode.RESOURCE_EXHAUSTED, "BUSY", ["google.rpc.RetryInfo"]),
    ({"model": "news", "at_least": 9}, grpc.StatusCode.FAILED_PRECONDITION, "STALE_GENERATION", []),
    ({"model": "buggy"}, grpc.StatusCode.INTERNAL, "INTERNAL", []),
])  # fmt: skip
async def test_faults(client: SimpleNamespace, fields: dict[str, Any], code: Any, reason: str, more: list[str]) -> None:
    found, info, details = await refused(client.call(SERVER, "Classify", input=["a"], **fields))
    assert (found, info.reason, details) == (code, reason, more)


async def test_what_is_not_valid(client: SimpleNamespace) -> None:
    code, info, _ = await refused(client.call(JOBS, "Submit", name="n", uses="u"))
    assert (code, info.metadata["code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid")


async def test_a_message_beyond_the_limit(client: SimpleNamespace, bus: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.call(SERVER, "Classify", input=["x" * 11_000_000], model="news")
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert bus.calls == []


async def test_health_follows_the_bus(client: SimpleNamespace, bus: Any) -> None:
    health = health_pb2_grpc.HealthStub(client.channel)
    status = health_pb2.HealthCheckResponse
    for service in ("", SERVER):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == status.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
    assert (await watch.read()).status == status.SERVING
    bus.connected = False
    assert (await watch.read()).status == status.NOT_SERVING
    watch.cancel()
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == status.NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(client: SimpleNamespace) -> None:
    assert {SERVER, JOBS, "kernelm.artifacts.v1.Artifacts", "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection"} <= client.services  # fmt: skip
    assert not any("Optimizer" in name for name in client.services), "it has only job methods"


async def test_a_taken_port(client: SimpleNamespace, gate: Any) -> None:
    with pytest.raises(ClientFault, match=str(client.port)) as caught:
        await start_grpc(gate, "127.0.0.1", client.port)
    assert caught.value.code == "port_taken"
    assert "KERNELM_GRPC_PORT" in caught.value.remedy
