"""The ASGI application: the endpoints that carry calls of models, on bare ASGI (see exchange.py), before all the rest.

Each endpoint names the structs of its request and answer, from which the OpenAPI document is made like that of any other
route. /v1/events goes this way too, since it goes on for long. A call that finds the gateway full is refused at once: what
waits here would only come late.
"""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from kernelm_contracts.retriever import AnswerFrame, RecommendReply, SearchReply
from kernelm_contracts.server import ClassifyReply, ExtractReply, GenerateFrame, Server, ToolCall
from kernelm_gateway.answers import ChatAnswer, ChatChunk, ChatCompletion, Completion, TextAnswer, usage
from kernelm_gateway.completions import ChatBody, CompletionBody
from kernelm_gateway.exchange import Exchange, Gone, Receive, Scope, Send, read
from kernelm_gateway.feed import Feed, events
from kernelm_gateway.gate import Gate
from kernelm_gateway.retrieval import Answer as SourcedAnswer
from kernelm_gateway.retrieval import AnswersBody, RecommendBody, SearchBody, answer, recommend, search
from kernelm_gateway.vectors import ClassifyBody, Embeddings, EmbeddingsBody, ExtractBody, classify, embed, extract
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.system import Key

EVENTS = "/v1/events"
GENERATE = method_of(Server.generate)
Answer = Callable[[Gate, Key, Any, Exchange], Awaitable[None]]


class Endpoint:
    """POST `path`: what it takes, what it gives, and how. Where it `streams`, `gives` may also come as events."""

    def __init__(self, path: str, takes: type[msgspec.Struct], gives: Any, answer: Answer, about: str, streams: Any = None) -> None:
        self.path, self.takes, self.gives, self.answer, self.about, self.streams = path, takes, gives, answer, about, streams
        self.decoder = msgspec.json.Decoder(takes)


async def generate(gate: Gate, key: Key, body: ChatBody | CompletionBody, exchange: Exchange) -> None:
    """A chat or a completion, whole or streamed."""
    answer = ChatAnswer(body.model) if isinstance(body, ChatBody) else TextAnswer(body.model)
    request = body.request()
    async with exchange.while_there(), aclosing(gate.stream(key, GENERATE, request, body.model)) as frames:
        text, calls, frame = [], list[ToolCall](), GenerateFrame()
        async for frame in frames:
            if body.stream:
                if events := answer.events(frame):
                    await exchange.write(events)
            else:
                text.append(frame.text)
                calls += frame.tool_calls
        usage(frame)
        if body.stream:
            wanted = body.stream_options is not None and bool(body.stream_options.include_usage)
            await exchange.end(answer.ending(frame, wanted))
        else:
            await exchange.reply(answer.whole("".join(text), calls, frame))


ENDPOINTS = (
    Endpoint("/v1/chat/completions", ChatBody, ChatCompletion, generate,
             "The next turn of a chat. With `stream` it comes as events, each a `chat.completion.chunk` of OpenAI's form.",
             ChatChunk),
    Endpoint("/v1/completions", CompletionBody, Completion, generate,
             "What follows a text. With `stream` it comes as events, each of the answer's form.", Completion),
    Endpoint("/v1/embeddings", EmbeddingsBody, Embeddings, embed, "A vector of unit length for each text."),
    Endpoint("/v1/classify", ClassifyBody, ClassifyReply, classify,
             "The labels of each text with their probabilities, best first."),
    Endpoint("/v1/extract", ExtractBody, ExtractReply, extract, "The entities of each text: label, place and score."),
    Endpoint("/v1/search", SearchBody, SearchReply, search, "The passages of an index that are nearest to a text."),
    Endpoint("/v1/recommend", RecommendBody, RecommendReply, recommend,
             "The documents of an index that are nearest to some of them, or to a text."),
    Endpoint("/v1/answers", AnswersBody, SourcedAnswer, answer,
             "An answer from the documents of an index, with sources. With `stream` it comes as events: sources, texts, the end.",
             AnswerFrame),
)  # fmt: skip


class Front:
    """Answers ENDPOINTS, and leaves all other paths to `rest`."""

    def __init__(self, gate: Gate, rest: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self.gate, self._rest = gate, rest
        self._endpoints = {endpoint.path: endpoint for endpoint in ENDPOINTS}
        self._under_way, self._feed = 0, Feed(gate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if (endpoint := self._endpoints.get(path)) is None and path != EVENTS:
            await self._rest(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        try:
            if (verb := "POST" if endpoint else "GET") != scope["method"]:
                raise ClientFault("method_not_allowed", f"{path} takes {verb} alone", f"use {verb}", allow=verb)
            if endpoint is None:
                await events(self._feed, self.gate, await self.gate.arrive(exchange.header), exchange)
            else:
                await self._answer(endpoint, exchange)
        except Gone:
            pass  # there is nobody to answer
        except Exception as error:
            await exchange.refuse(error)

    async def _answer(self, endpoint: Endpoint, exchange: Exchange) -> None:
        self._under_way += 1
        try:
            await self._call(endpoint, exchange)
        finally:
            self._under_way -= 1

    async def _call(self, endpoint: Endpoint, exchange: Exchange) -> None:
        gate = self.gate
        if self._under_way > gate.settings.most_calls:
            what = f"{gate.settings.most_calls} calls are under way in this gateway"
            raise ClientFault("busy", what, "try again, or ask another gateway", retriable=True)
        key = await gate.arrive(exchange.header)
        async with exchange.within(exchange.wanted_s or gate.settings.answer_s):
            body = read(endpoint.decoder, await exchange.body(gate.settings.max_body_bytes))
            await endpoint.answer(gate, key, body, exchange)
