"""`kernelm call MODEL TEXT`: the labels or the entities of a text, or what a model writes to it, over NATS, HTTP or gRPC, as any
client would ask for them."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernelm_cli.results import short
from kernelm_cli.session import Output, asking, connection, print_json, print_piece, running, stdout
from kernelm_contracts.server import (
    ClassifyReply,
    ClassifyRequest,
    ExtractReply,
    ExtractRequest,
    GenerateFrame,
    GenerateRequest,
    Server,
    Usage,
)  # fmt: skip
from kernelm_sdk import tls
from kernelm_sdk.bus import Bus
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import ClientFault, Fault, FaultBody, KernelFault, PluginFault, Whose, from_body

TIMEOUT_S = 30.0
WRITING_S = 300.0  # for a text that a model writes
BAR = 30  # characters for a probability of 1
Request = ClassifyRequest | ExtractRequest | GenerateRequest
UNREACHABLE = "`kernelm doctor` says whether the gateway runs"


class Written(msgspec.Struct):
    """What a model has written, and the last frame: how it ended, what it cost, who gave it."""

    text: str
    end: GenerateFrame


Reply = ClassifyReply | ExtractReply | Written


def call(model: Annotated[str, Parameter(name="MODEL")],
         text: Annotated[str, Parameter(name="TEXT", allow_leading_hyphen=True)], /, *, output: Output = Output(),
         via: Literal["nats", "http", "grpc"] = "nats",
         key: Annotated[str, Parameter(env_var="KERNELM_KEY", show_default=False)] = "", top: int = 0) -> int:  # fmt: skip
    """Ask the deployment MODEL about TEXT ("-": what stands on the standard input): its labels, the entities in it, or what a model
    that writes makes of it, such as its translation.

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
    try:
        reply = _ask(output, via, key, ClassifyRequest((content,), model, top))
    except ClientFault as fault:
        if fault.code != "unsupported_method" or top:
            raise
        reply = _otherwise(output, via, key, model, content)
    if output.json:
        print_json(reply)
    elif isinstance(reply, Written):
        print_piece(f"{reply.text}\n")
        stdout().print(_writer(reply.end))
    elif isinstance(reply, ExtractReply):
        show_entities(reply, content, stdout())
    else:
        show(reply, stdout())
    return 0


def _ask(output: Output, via: str, key: str, request: Request) -> Reply:
    up = running(output.folder)
    if via == "http":
        return over_http(up.http, key, request)
    if via == "grpc":
        return over_grpc(up.grpc, key, request)
    return asyncio.run(_over_nats(output, request))


def _otherwise(output: Output, via: str, key: str, model: str, text: str) -> Reply:
    """What a model without labels for texts may give instead: entities, or the likeliest text."""
    for request in (ExtractRequest((text,), model), GenerateRequest(prompt=text, model=model, temperature=0.0, stream=False)):
        try:
            return _ask(output, via, key, request)
        except ClientFault as fault:
            if fault.code != "unsupported_method":
                raise
    raise ClientFault("unsupported_method", f"{model!r} gives neither labels nor entities, and writes nothing",
                      "`kernelm search` asks an index of documents")  # fmt: skip


def _method(request: Request) -> Any:
    return {ClassifyRequest: Server.classify, ExtractRequest: Server.extract, GenerateRequest: Server.generate}[type(request)]


async def _over_nats(output: Output, request: Request) -> Reply:
    async with connection(output.folder) as bus:
        try:
            with asking(request.model):
                return await _patiently(bus, request)
        except ValueError as error:  # a name that can't stand in a subject
            raise ClientFault("unknown_model", f"{request.model!r} is no model: {error}", "kernelm model list") from None


async def _patiently(bus: Bus, request: Request) -> Reply:
    """The answer; a model that had no instance, and is being started for this call, is waited for."""
    if isinstance(request, GenerateRequest):  # its model has refused two requests before, and so runs
        stream = bus.stream(Server.generate, request, model=request.model, idle_s=WRITING_S)
        return written([frame async for frame in stream])
    try:
        reply: Reply = await bus.call(_method(request), request, model=request.model, timeout_s=TIMEOUT_S)
    except KernelFault as fault:
        if fault.code != "starting":
            raise
        reply = await bus.call(_method(request), request, model=request.model, timeout_s=TIMEOUT_S, patience_s=TIMEOUT_S)
    return reply


def written(frames: Sequence[GenerateFrame]) -> Written:
    """All frames of an answer as one."""
    return Written("".join(frame.text for frame in frames), frames[-1])


class _Choice(msgspec.Struct):
    text: str
    finish_reason: Literal["stop", "length"]


class _Completion(msgspec.Struct):
    """The gateway's answer of `/v1/completions`."""

    choices: list[_Choice]
    usage: dict[str, Any]
    model: str
    generation: int
    artifact: str

    def written(self) -> Written:
        choice, usage = self.choices[0], Usage(self.usage["prompt_tokens"], self.usage["completion_tokens"])
        return Written(choice.text, GenerateFrame("", choice.finish_reason, usage, self.model, self.generation, self.artifact))


class _Refusal(msgspec.Struct):
    """The gateway's `{"error": {...}}`."""

    error: FaultBody


def over_http(url: str, key: str, request: Request) -> Reply:
    """POST /v1/classify, /v1/extract or /v1/completions; the gateway's refusals are raised as the faults they were."""
    import httpx

    method, writes = method_of(_method(request)), isinstance(request, GenerateRequest)
    body = msgspec.to_builtins(request)
    if writes:
        body = {name: body[name] for name in ("model", "prompt", "temperature")}
    try:
        verify = tls.client_context() if url.startswith("https:") else True
        answer = httpx.post(f"{url}/v1/{'completions' if writes else method.name}", json=body,
                            headers={"Authorization": f"Bearer {key}"}, timeout=WRITING_S if writes else TIMEOUT_S,
                            verify=verify)  # fmt: skip
    except httpx.HTTPError as error:
        raise KernelFault("gateway_unreachable", f"{url}: {error or type(error).__name__}", UNREACHABLE) from None
    if answer.is_success:
        if writes:
            return msgspec.json.decode(answer.content, type=_Completion).written()
        return msgspec.json.decode(answer.content, type=method.reply)  # type: ignore[return-value]
    try:
        raise from_body(msgspec.json.decode(answer.content, type=_Refusal).error)
    except msgspec.DecodeError:
        raise KernelFault("gateway", f"{url}: HTTP {answer.status_code} {answer.text[:200]}", "is it kernelm's gateway?") from None


def over_grpc(address: str, key: str, request: Request) -> Reply:
    """kernelm.server.v1.Server/Classify, Extract or Generate, with messages of the contract; faults come back as they were."""
    import grpc
    from google.protobuf import message_factory

    from kernelm_gateway import protobuf
    from kernelm_gateway.messages import Codec

    method = method_of(_method(request))
    service = f"{protobuf.package(Server)}.{Server.__name__}"
    methods = protobuf.make_pool([protobuf.describe(Server)]).FindServiceByName(service).methods_by_name
    descriptor = methods[protobuf.method_name(method)]
    ask, answer = (message_factory.GetMessageClass(t) for t in (descriptor.input_type, descriptor.output_type))
    given = tls.files()
    believed = grpc.ssl_channel_credentials(Path(given.ca).read_bytes()) if given else None
    with grpc.secure_channel(address, believed) if believed else grpc.insecure_channel(address) as channel:
        writes = isinstance(request, GenerateRequest)
        kind = channel.unary_stream if writes else channel.unary_unary
        invoke = kind(f"/{service}/{descriptor.name}", ask.SerializeToString, answer.FromString)
        try:
            message = invoke(Codec(method.request, ask).write(request), timeout=WRITING_S if writes else TIMEOUT_S,
                             metadata=(("authorization", f"Bearer {key}"),))  # fmt: skip
            replies: list[Any] = [Codec(method.reply, answer).read(one) for one in (message if writes else [message])]
        except grpc.RpcError as error:
            raise _of_status(address, error) from None
    return written(replies) if writes else replies[0]


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
    console.print(_giver(reply))


def show_entities(reply: ExtractReply, text: str, console: Console) -> None:
    """The text with its entities marked, and a line for each."""
    for found in reply.results:
        marked = Text(text)
        table = Table.grid(padding=(0, 2))
        for entity in found:
            marked.stylize("bold green", entity.start, entity.end)
            table.add_row(Text(text[entity.start : entity.end], "bold green"), entity.label, Text(f"{entity.score:.4f}", "dim"))
        console.print(marked)
        console.print(table if found else Text("no entity", "dim"))
    console.print(_giver(reply))


def _writer(end: GenerateFrame) -> Text:
    made = f"{end.usage.completion_tokens} tokens" if end.usage else ""
    cut = ", cut off there" if end.finish_reason == "length" else ""
    return Text(f"{end.model} generation {end.generation}, artifact {short(end.artifact)}, {made}{cut}", "dim")


def _giver(reply: ClassifyReply | ExtractReply) -> Text:
    return Text(f"{reply.model} generation {reply.generation}, artifact {short(reply.artifact)}, {reply.tokens} tokens, "
                f"{reply.took_ms:.1f} ms", "dim")  # fmt: skip
