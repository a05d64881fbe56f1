"""KServe's Open Inference Protocol v2, answered by deployments: `ModelInfer` is `classify`, `embed` or `generate` of `server/1`.

A model takes one tensor of texts (BYTES, any name). Which method is meant says the parameter "method", else it is the first
that the model has (`info`). What comes back:
    classify   "label" BYTES [texts, labels], "score" FP64 of the same shape; parameter top
    embed      "embedding" FP32 [texts, size]
    generate   "text" and "finish_reason" BYTES [1], "prompt_tokens" and "completion_tokens" INT64 [1], for one text;
               parameters max_tokens, temperature, top_p, top_k, seed, stop
A model's version is its generation. Liveness, readiness and metadata of the server need no key, all else does.
Source: github.com/kserve/open-inference-protocol, specification/protocol/inference_grpc.md.
"""

import functools
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool

from kernelm_contracts.server import (
    ClassifyReply,
    ClassifyRequest,
    EmbedReply,
    EmbedRequest,
    GenerateFrame,
    GenerateRequest,
    InfoRequest,
    Server,
    ServerInfo,
)
from kernelm_gateway import open_inference
from kernelm_gateway.gate import Gate, unknown_model
from kernelm_gateway.grpc_answers import metadata, refuse, status_of
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Key

CLASSIFY, EMBED, GENERATE, INFO = map(method_of, (Server.classify, Server.embed, Server.generate, Server.info))
SAMPLING = {"max_tokens": int, "temperature": float, "top_p": float, "top_k": int, "seed": int}
PARAMETERS: dict[str, dict[str, type]] = {"classify": {"top": int}, "embed": {}, "generate": {**SAMPLING, "stop": str}}
OUTPUTS = {
    "classify": (("label", "BYTES", (-1, -1)), ("score", "FP64", (-1, -1))), "embed": (("embedding", "FP32", (-1, -1)),),
    "generate": (("text", "BYTES", (1,)), ("finish_reason", "BYTES", (1,)), ("prompt_tokens", "INT64", (1,)),
                 ("completion_tokens", "INT64", (1,))),
}  # fmt: skip


class InferenceService:
    """The six methods. `pool` holds the protocol's descriptor."""

    def __init__(self, gate: Gate, pool: DescriptorPool, version: str) -> None:
        self.gate, self.version = gate, version
        self._first: dict[str, tuple[str, int]] = {}  # model -> its first method, and the generation that said so
        service = pool.FindServiceByName(open_inference.SERVICE)
        self._types = {m.name: tuple(map(message_factory.GetMessageClass, (m.input_type, m.output_type))) for m in service.methods}

    def handler(self) -> grpc.GenericRpcHandler:
        """For `grpc.aio.Server.add_generic_rpc_handlers`."""
        return grpc.method_handlers_generic_handler(open_inference.SERVICE, {
            name: grpc.unary_unary_rpc_method_handler(self._answering(name), taken.FromString, given.SerializeToString)
            for name, (taken, given) in self._types.items()})  # fmt: skip

    def _answering(self, name: str) -> Any:
        answer, given = getattr(self, f"_{name}"), self._types[name][1]

        async def respond(request: Any, context: Any) -> Any:
            try:
                return await answer(request, given(), context)
            except Exception as error:
                status = status_of(error, f"{open_inference.SERVICE}/{name}")
            return await refuse(context, status)

        return respond

    async def _key(self, context: Any) -> Key:
        return await self.gate.arrive(metadata(context))

    async def _ServerLive(self, _: Any, response: Any, context: Any) -> Any:
        response.live = True
        return response

    async def _ServerReady(self, _: Any, response: Any, context: Any) -> Any:
        response.ready = self.gate.bus.connected
        return response

    async def _ServerMetadata(self, _: Any, response: Any, context: Any) -> Any:
        response.name, response.version = "kernelm", self.version
        return response

    async def _ModelReady(self, request: Any, response: Any, context: Any) -> Any:
        key, state = await self._key(context), await self.gate.state()
        for route in self.gate.visible(key, state):
            if route.name == request.name and request.version in ("", str(route.generation)):
                pools = {to.pool for to in route.to}
                response.ready = any(i.pool in pools and i.state == "ready" for i in state.instances)
                return response
        raise unknown_model(request.name)

    async def _ModelMetadata(self, request: Any, response: Any, context: Any) -> Any:
        key = await self._key(context)
        info: ServerInfo = await self.gate.call(key, INFO, InfoRequest(request.name), request.name)
        _check_version(request.version, info.generation)
        response.name, response.platform = info.model, "kernelm"
        response.versions.append(str(info.generation))
        response.inputs.add(name="text", datatype="BYTES", shape=(-1,))
        for method in info.methods:
            for name, datatype, shape in OUTPUTS.get(method, ()):
                response.outputs.add(name=name, datatype=datatype, shape=shape)
        return response

    async def _ModelInfer(self, request: Any, response: Any, context: Any) -> Any:
        key, model, texts = await self._key(context), request.model_name, open_inference.texts(request)
        left_s = context.time_remaining() or 0.0
        method = request.parameters["method"].string_param if "method" in request.parameters else ""
        ask = functools.partial(self._infer, key, request, texts, left_s)
        if method:
            reply = await ask(method)
        else:
            method, reply = await self._ask_first(key, model, ask)
        _check_version(request.model_version, reply.generation)
        response.model_name, response.model_version, response.id = reply.model, str(reply.generation), request.id
        response.parameters["artifact"].string_param = reply.artifact
        wanted = [output.name for output in request.outputs] or [name for name, _, _ in OUTPUTS[method]]
        made = _tensors(reply)
        for name in wanted:
            if name not in made:
                raise ClientFault("invalid", f"outputs: there is no {name[:64]!r}", f"there are {', '.join(made)}", param="outputs")
            open_inference.fill(response, bool(request.raw_input_contents), name, *made[name])
        return response

    async def _ask_first(self, key: Key, model: str, ask: Callable[[str], Awaitable[Any]]) -> tuple[str, Any]:
        """The model's first method and its reply. Which that is, is asked of each generation once."""
        known = self._first.get(model)
        if known is not None:
            try:
                return known[0], self._of_generation(model, await ask(known[0]))
            except ClientFault as fault:
                if fault.code != "unsupported_method":
                    raise
        info: ServerInfo = await self.gate.call(key, INFO, InfoRequest(model), model)
        method = info.methods[0] if info.methods else ""
        self._first[model] = method, info.generation
        return method, self._of_generation(model, await ask(method))

    def _of_generation(self, model: str, reply: Any) -> Any:
        """The reply; what was known of another generation than its is forgotten."""
        if model in self._first and self._first[model][1] != reply.generation:
            del self._first[model]
        return reply

    async def _infer(self, key: Key, request: Any, texts: tuple[str, ...], left_s: float, method: str) -> Any:
        if method not in PARAMETERS:
            raise ClientFault("unsupported_method", f"{method[:64]!r} is no method of models", f"one of {', '.join(PARAMETERS)}")
        given, model = open_inference.parameters(request, {"method": str, **PARAMETERS[method]}), request.model_name
        given.pop("method", None)
        if method == "classify":
            return await self.gate.call(key, CLASSIFY, ClassifyRequest(texts, model, **given), model, left_s)
        if method == "embed":
            return await self.gate.call(key, EMBED, EmbedRequest(texts, model), model, left_s)
        if len(texts) != 1:
            raise ClientFault("invalid", f"inputs[0]: {len(texts)} texts", "send one request a text to go on with", param="inputs")
        stop = (given.pop("stop"),) if "stop" in given else ()
        asked = GenerateRequest(prompt=texts[0], model=model, stop=stop, stream=False, **given)
        whole, last = [], GenerateFrame()
        async with aclosing(self.gate.stream(key, GENERATE, asked, model)) as frames:
            async for last in frames:
                whole.append(last.text)
        return Generated(last, "".join(whole))


class Generated:
    """A whole answer of `generate`, with the fields that every reply of `server/1` has."""

    def __init__(self, last: GenerateFrame, text: str) -> None:
        self.model, self.generation, self.artifact, self.last, self.text = last.model, last.generation, last.artifact, last, text


def _tensors(reply: ClassifyReply | EmbedReply | Generated) -> dict[str, tuple[str, tuple[int, ...], list[Any]]]:
    """Output -> datatype, shape, elements."""
    if isinstance(reply, Generated):
        usage = reply.last.usage
        return {"text": ("BYTES", (1,), [reply.text]), "finish_reason": ("BYTES", (1,), [reply.last.finish_reason]),
                "prompt_tokens": ("INT64", (1,), [usage.prompt_tokens if usage else 0]),
                "completion_tokens": ("INT64", (1,), [usage.completion_tokens if usage else 0])}  # fmt: skip
    if isinstance(reply, EmbedReply):
        shape = (len(reply.embeddings), len(reply.embeddings[0]) if reply.embeddings else 0)
        return {"embedding": ("FP32", shape, [value for row in reply.embeddings for value in row])}
    shape = (len(reply.results), len(reply.results[0]) if reply.results else 0)
    return {"label": ("BYTES", shape, [label.label for row in reply.results for label in row]),
            "score": ("FP64", shape, [label.score for row in reply.results for label in row])}  # fmt: skip


def _check_version(wanted: str, generation: int) -> None:
    if wanted not in ("", str(generation)):
        raise ClientFault("stale_generation", f"version {wanted[:16]!r} is not what answers: generation {generation} does",
                          "leave the version out, or send that one")  # fmt: skip
