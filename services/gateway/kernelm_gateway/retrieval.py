"""`/v1/search`, `/v1/recommend` and `/v1/answers`: what an index of documents finds, `retriever/1` over HTTP."""

from contextlib import aclosing
from typing import Annotated

import msgspec

from kernelm_contracts.retriever import (
    AnswerFrame,
    AnswerRequest,
    RecommendReply,
    RecommendRequest,
    Retriever,
    SearchReply,
    SearchRequest,
    Source,
)
from kernelm_contracts.server import Usage
from kernelm_gateway.answers import DONE
from kernelm_gateway.exchange import Exchange, encode
from kernelm_gateway.gate import Gate
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import PluginFault
from kernelm_sdk.system import Key

SEARCH, RECOMMEND, ANSWER = map(method_of, (Retriever.search, Retriever.recommend, Retriever.answer))
Natural = Annotated[int, msgspec.Meta(ge=0)]


class SearchBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to look for, and in which index."""

    model: str  # the deployment of an index
    query: str
    top: Natural = 5  # the nearest so many passages
    at_least: Natural = 0  # refuse with 409 if the deployment's generation is lower


class RecommendBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What documents shall be like: documents of the index, a text, or both."""

    model: str
    documents: list[str] = []  # ids; they are not recommended again
    text: str = ""
    top: Natural = 5
    at_least: Natural = 0


class AnswersBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question, and the index that it is to be answered from."""

    model: str
    question: str
    top: Natural = 4  # passages that the answer may be made of
    max_tokens: Natural = 0  # 0: as the server is set
    stream: bool = False
    at_least: Natural = 0


class Answer(msgspec.Struct, frozen=True):
    answer: str
    sources: tuple[Source, ...]  # as the answer numbers them, from 1
    finish_reason: str  # "stop", "length"; "no_source": nothing that is near enough to the question
    model: str
    generation: int
    artifact: str  # digest of the index
    generator: str = ""  # digest of the model that has written the answer
    usage: Usage | None = None


async def search(gate: Gate, key: Key, body: SearchBody, exchange: Exchange) -> None:
    request = SearchRequest(body.query, body.model, body.top, body.at_least)
    reply: SearchReply = await gate.call(key, SEARCH, request, body.model, exchange.wanted_s)
    await exchange.reply(reply)


async def recommend(gate: Gate, key: Key, body: RecommendBody, exchange: Exchange) -> None:
    request = RecommendRequest(tuple(body.documents), body.text, body.model, body.top, body.at_least)
    reply: RecommendReply = await gate.call(key, RECOMMEND, request, body.model, exchange.wanted_s)
    await exchange.reply(reply)


async def answer(gate: Gate, key: Key, body: AnswersBody, exchange: Exchange) -> None:
    """Whole, or as events, each a frame of the answer: the sources, texts, the end."""
    request = AnswerRequest(body.question, body.model, body.top, body.max_tokens, body.at_least)
    async with exchange.while_there(), aclosing(gate.stream(key, ANSWER, request, body.model)) as frames:
        text, sources, frame = [], tuple[Source, ...](), AnswerFrame()
        async for frame in frames:
            if body.stream:
                await exchange.write(b"data: " + encode(frame) + b"\n\n")
            text.append(frame.text)
            sources = frame.sources or sources
        if not frame.finish_reason:
            raise PluginFault("protocol", "the server did not say how its answer ended", "see the server's log")
        if body.stream:
            await exchange.end(DONE)
        else:
            await exchange.reply(Answer("".join(text), sources, frame.finish_reason, frame.model, frame.generation, frame.artifact,
                                        frame.generator, frame.usage))  # fmt: skip
