"""What the retriever asks of other deployments: vectors and answers."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import numpy as np

from kernelm_contracts.admission import TENANT, deadline, owner
from kernelm_contracts.server import EmbedReply, EmbedRequest, GenerateFrame, GenerateRequest, Server
from kernelm_retriever.index import Array, unit
from kernelm_sdk.errors import Fault, KernelFault, PluginFault
from kernelm_sdk.plugin import Call, Context

PATIENCE_S = 60.0  # for a deployment that is restarted, or is being started for this call
EMBED_S, FRAME_S = 120.0, 300.0  # for the vectors of a batch; for the next piece of an answer


async def vectors(context: Context, texts: Sequence[str], embedder: str, model: str, call: Call | None = None) -> Array:
    """[texts, dimensions] of unit length, from the deployment `embedder`; PluginFault "stale_index" if that serves another model
    than `model` by now, "not_deployed" if nothing answers. `call`: for whom, and until when."""
    timeout_s, headers, patience_s = EMBED_S, None, PATIENCE_S  # a job outlives a restart of the embedder
    if call is not None:  # whoever calls wants to know at once that nobody is there
        headers, until, patience_s = {TENANT: owner(call)}, deadline(call), 0.0
        timeout_s = min(EMBED_S, until - asyncio.get_running_loop().time()) if until is not None else EMBED_S
    request = EmbedRequest(tuple(texts))
    reply: EmbedReply | None = None
    while reply is None:
        try:
            reply = await context.bus.call(Server.embed, request, model=embedder, timeout_s=timeout_s, patience_s=patience_s,
                                           headers=headers)  # fmt: skip
        except KernelFault as fault:
            if fault.code != "starting" or patience_s:
                raise _of(fault, embedder, "makes the vectors") from None
            patience_s = min(PATIENCE_S, timeout_s)  # it had no instance, and gets one for this call
    if reply.artifact != model:
        raise PluginFault("stale_index", f"the index was made with {model} of the deployment {embedder!r}, which serves "
                          f"{reply.artifact} now: their vectors can't be compared",
                          f"make the index again, or `kernelm model rollback {embedder}`")  # fmt: skip
    return unit(np.asarray(reply.embeddings, np.float32))


async def frames(context: Context, request: GenerateRequest, generator: str, call: Call) -> AsyncGenerator[GenerateFrame, None]:
    """The pieces of an answer by the deployment `generator`; whoever stops reading them stops it."""
    try:
        said = context.bus.stream(Server.generate, request, model=generator, idle_s=FRAME_S, headers={TENANT: owner(call)})
        async with aclosing(said) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece
    except KernelFault as fault:
        raise _of(fault, generator, "writes the answers") from None


def _of(fault: KernelFault, deployment: str, does: str) -> Fault:
    """Nobody there is a fault of whoever deployed this, and not of who calls it."""
    if fault.code != "no_responders":
        return fault
    return PluginFault("not_deployed", f"the deployment {deployment!r}, which {does}, does not answer",
                       f"`kernelm model list` shows what is deployed; deploy {deployment}", retriable=True)  # fmt: skip
