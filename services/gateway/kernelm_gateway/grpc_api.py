"""gRPC: every callable method of every contract, from descriptors that are made at start; health and reflection.

Sources: grpc.io, "Core concepts"; github.com/grpc/grpc, doc/health-checking.md and doc/server-reflection.md.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from kernelm_gateway import open_inference, protobuf
from kernelm_gateway.gate import Gate
from kernelm_gateway.grpc_answers import metadata, refuse, status_of
from kernelm_gateway.inference_api import InferenceService
from kernelm_gateway.messages import Codec
from kernelm_sdk import tls
from kernelm_sdk.contract import CONTRACTS, Contract, Method
from kernelm_sdk.errors import ClientFault, invalid
from kernelm_sdk.system import Key

WATCH_S = 0.5  # how often a health watcher's answer is looked at anew: the connection does not tell when it is lost
Health = health_pb2.HealthCheckResponse


async def start_grpc(gate: Gate, host: str, port: int) -> tuple[grpc.aio.Server, int]:
    """Serve on `host`:`port` (0: a free one); the server and its port. ClientFault "port_taken"."""
    contracts = [c for c in CONTRACTS.values() if protobuf.callable_methods(c)]
    files = [*(protobuf.describe(c) for c in contracts), open_inference.describe()]
    pool = protobuf.make_pool(files)
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        pool.AddSerializedFile(file.serialized_pb)
    limit = gate.settings.max_body_bytes
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", limit), ("grpc.so_reuseport", 0)])
    services = {protobuf.package(c) + f".{c.__name__}": c for c in contracts}
    server.add_generic_rpc_handlers([_service(gate, name, contract, pool) for name, contract in services.items()])
    server.add_generic_rpc_handlers([InferenceService(gate, pool, version("kernelm-gateway")).handler()])
    names = [*services, open_inference.SERVICE]
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(gate, frozenset(names)), server)
    reflection.enable_server_reflection([*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                                         reflection.SERVICE_NAME], server, pool)  # fmt: skip
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_secure_port(address, _credentials()) if tls.files() else server.add_insecure_port(address)
    except RuntimeError as error:
        raise ClientFault("port_taken", f"gRPC can't listen on {address}: {error}",
                          "set KERNELM_GRPC_PORT to another port (0 for a free one)") from None  # fmt: skip
    await server.start()
    return server, bound


def _credentials() -> grpc.ServerCredentials:
    """The environment's certificate; gRPC asks for another one before each handshake."""

    def present() -> tuple[int, grpc.ServerCertificateConfiguration]:
        given, at = tls.needed(), tls.stamp()
        pair = (Path(given.key).read_bytes(), Path(given.certificate).read_bytes())
        return at, grpc.ssl_server_certificate_configuration([pair])

    shown, first = present()

    def another() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        if tls.stamp() == shown:
            return None
        shown, now = present()
        return now

    return grpc.dynamic_ssl_server_credentials(first, another)


def _service(gate: Gate, name: str, contract: type[Contract], pool: DescriptorPool) -> grpc.GenericRpcHandler:
    handlers = {}
    for method in protobuf.callable_methods(contract):
        endpoint = Endpoint(gate, method, pool, name)
        read, write = endpoint.request.message.FromString, endpoint.reply.message.SerializeToString
        if method.kind == "streamed":
            handler = grpc.unary_stream_rpc_method_handler(endpoint.streamed, read, write)
        else:
            handler = grpc.unary_unary_rpc_method_handler(endpoint.unary, read, write)
        handlers[protobuf.method_name(method)] = handler
    return grpc.method_handlers_generic_handler(name, handlers)


class Endpoint:
    """One method over gRPC."""

    def __init__(self, gate: Gate, method: Method, pool: DescriptorPool, service: str) -> None:
        self.gate, self.method = gate, method
        descriptor = pool.FindServiceByName(service).methods_by_name[protobuf.method_name(method)]
        self.request = Codec(method.request, message_factory.GetMessageClass(descriptor.input_type))
        self.reply = Codec(method.reply, message_factory.GetMessageClass(descriptor.output_type))

    async def unary(self, message: Message, context: Any) -> Message:
        try:
            key, request, model = await self._admit(message, context)
            reply = await self.gate.call(key, self.method, request, model, context.time_remaining() or 0.0)
            return self.reply.write(reply)
        except Exception as error:
            status = status_of(error, f"{self.method.contract.id()}.{self.method.name}")
        return await refuse(context, status)

    async def streamed(self, message: Message, context: Any) -> AsyncIterator[Message]:
        try:
            key, request, model = await self._admit(message, context)
            async with aclosing(self.gate.stream(key, self.method, request, model)) as frames:
                async for frame in frames:
                    yield self.reply.write(frame)
            return
        except Exception as error:
            status = status_of(error, f"{self.method.contract.id()}.{self.method.name}")
        await refuse(context, status)

    async def _admit(self, message: Message, context: Any) -> tuple[Key, msgspec.Struct, str]:
        key = await self.gate.arrive(metadata(context))
        try:
            request = self.request.read(message)
        except msgspec.ValidationError as error:
            raise invalid(f"{self.method.contract.id()}.{self.method.name}: the request", error) from None
        return key, request, getattr(request, "model", "") if self.method.scope == "model" else ""


class HealthServicer(health_pb2_grpc.HealthServicer):
    """SERVING only while the gateway is connected to the bus, for the server ("") and each of its services alike."""

    def __init__(self, gate: Gate, names: frozenset[str]) -> None:
        self._gate, self._names = gate, names | {""}

    def _status(self, service: str) -> Any:
        if service not in self._names:
            return Health.SERVICE_UNKNOWN
        return Health.SERVING if self._gate.bus.connected else Health.NOT_SERVING

    async def Check(self, request: Any, context: Any) -> Any:  # the name in the .proto
        status = self._status(request.service)
        if status == Health.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {request.service!r} is not known")
        return Health(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        told = None
        while True:  # until the client leaves: then gRPC cancels this task
            if (status := self._status(request.service)) != told:
                told = status
                yield Health(status=status)
            await asyncio.sleep(WATCH_S)
