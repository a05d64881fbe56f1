"""`kernelm call MODEL TEXT`: classify a text over NATS, HTTP or gRPC, as any client would."""

import asyncio
import sys
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernelm_cli.results import short
from kernelm_cli.session import Output, connection, print_json, running, stdout
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, Server
from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import ClientFault, Fault, FaultBody, KernelFault, PluginFault, Whose, from_body

TIMEOUT_S = 30.0
BAR = 30  # characters for a probability of 1
UNREACHABLE = "`kernelm doctor` says whether the gateway runs"


def call(model: Annotated[str, Parameter(name="MODEL")],
         text: Annotated[str, Parameter(name="TEXT", allow_leading_hyphen=True)], /, *, output: Output = Output(),
         via: Literal["nats", "http", "grpc"] = "nats",
         key: Annotated[str, Parameter(env_var="KERNELM_KEY", show_default=False)] = "", top: int = 0) -> int:  # fmt: skip
    """Classify TEXT ("-": what stands on the standard input) with the deployment MODEL.

    Parameters
    ----------
    via
        The way in. NATS goes as the administrator of the home; HTTP and gRPC need a key.
    key
        An API key, from `kernelm key create`.
    top
        Only the best so many labels; 0 for all.
    """
    content = sys.stdin.read() if text == "-" else text
    if not content.strip():
        raise ClientFault("invalid", "the text is empty", "give a text, or - for the standard input")
    if via != "nats" and not key:
        raise ClientFault("unauthorized", f"a call over {via} needs an API key",
                          "kernelm key create NAME, then --key or KERNELM_KEY")  # fmt: skip
    request = ClassifyRequest((content,), model, top)
    up = running(output.folder)
    if via == "http":
        reply = over_http(up.http, key, request)
    elif via == "grpc":
        reply = over_grpc(up.grpc, key, request)
    else:
        reply = asyncio.run(_over_nats(output, request))
    if output.json:
        print_json(reply)
    else:
        show(reply, stdout())
    return 0


async def _over_nats(output: Output, request: ClassifyRequest) -> ClassifyReply:
    async with connection(output.folder) as bus:
        try:
            reply: ClassifyReply = await _patiently(bus, request)
        except ValueError as error:  # a name that can't stand in a subject
            raise ClientFault("unknown_model", f"{request.model!r} is no model: {error}", "kernelm model list") from None
        except KernelFault as fault:
            if fault.code != "no_responders":
                raise
            raise ClientFault("unknown_model", f"no deployment {request.model!r} answers", "kernelm model list") from None
        return reply


async def _patiently(bus: Bus, request: ClassifyRequest) -> ClassifyReply:
    """The answer; a model that had no instance, and is being started for this call, is waited for."""
    try:
        reply: ClassifyReply = await bus.call(Server.classify, request, model=request.model, timeout_s=TIMEOUT_S)
    except KernelFault as fault:
        if fault.code != "starting":
            raise
        reply = await bus.call(Server.classify, request, model=request.model, timeout_s=TIMEOUT_S, patience_s=TIMEOUT_S)
    return reply


class _Refusal(msgspec.Struct):
    """The gateway's `{"error": {...}}`."""

    error: FaultBody


def over_http(url: str, key: str, request: ClassifyRequest) -> ClassifyReply:
    """POST /v1/classify; the gateway's refusals are raised as the faults they were."""
    import httpx

    body = {"model": request.model, "input": request.input, "top": request.top}
    try:
        answer = httpx.post(f"{url}/v1/classify", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        raise KernelFault("gateway_unreachable", f"{url}: {error or type(error).__name__}", UNREACHABLE) from None
    if answer.is_success:
        return msgspec.json.decode(answer.content, type=ClassifyReply)
    try:
        raise from_body(msgspec.json.decode(answer.content, type=_Refusal).error)
    except msgspec.DecodeError:
        raise KernelFault("gateway", f"{url}: HTTP {answer.status_code} {answer.text[:200]}", "is it kernelm's gateway?") from None


def over_grpc(address: str, key: str, request: ClassifyRequest) -> ClassifyReply:
    """kernelm.server.v1.Server/Classify, with messages made from the contract; faults come back as they were."""
    import grpc
    from google.protobuf import message_factory

    from kernelm_gateway import protobuf
    from kernelm_gateway.messages import Codec

    method = method_of(Server.classify)
    service = f"{protobuf.package(Server)}.{Server.__name__}"
    methods = protobuf.make_pool([protobuf.describe(Server)]).FindServiceByName(service).methods_by_name
    descriptor = methods[protobuf.method_name(method)]
    ask, answer = (message_factory.GetMessageClass(t) for t in (descriptor.input_type, descriptor.output_type))
    with grpc.insecure_channel(address) as channel:
        invoke = channel.unary_unary(f"/{service}/{descriptor.name}", ask.SerializeToString, answer.FromString)
        try:
            message = invoke(Codec(method.request, ask).write(request), timeout=TIMEOUT_S,
                             metadata=(("authorization", f"Bearer {key}"),))  # fmt: skip
        except grpc.RpcError as error:
            raise _of_status(address, error) from None
    reply = Codec(method.reply, answer).read(message)
    assert isinstance(reply, ClassifyReply)
    return reply


def _of_status(address: str, error: object) -> Fault:
    """The fault behind a gRPC status: the gateway's `ErrorInfo` names it."""
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            facts = info.metadata
            classes: dict[Whose, type[Fault]] = {"client": ClientFault, "plugin": PluginFault, "kernel": KernelFault}
            return classes.get(facts["whose"], KernelFault)(facts["code"], status.message, facts["remedy"])
    return KernelFault("gateway_unreachable", f"{address}: {error.details()}", UNREACHABLE)  # type: ignore[attr-defined]


def show(reply: ClassifyReply, console: Console) -> None:
    """Labels with bars as long as their probability, then who gave the answer."""
    for labels in reply.results:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(width=BAR)
        table.add_column(justify="right")
        for rank, label in enumerate(labels):
            style = "bold green" if rank == 0 else "dim"
            bar = "█" * round(label.score * BAR) or "▏"
            table.add_row(Text(label.label, style), Text(bar, style), Text(f"{label.score:.4f}", style))
        console.print(table)
    console.print(Text(f"{reply.model} generation {reply.generation}, artifact {short(reply.artifact)}, {reply.tokens} tokens, "
                       f"{reply.took_ms:.1f} ms", "dim"))  # fmt: skip
