"""`/v1/classify`, `/v1/extract` and `/v1/embeddings`: what is one call of `server/1` and one answer.

Source: OpenAI API reference, "Create embeddings".
"""

import base64
import struct
from typing import Annotated, Literal

import msgspec

from kernelm_contracts.server import (
    ClassifyReply,
    ClassifyRequest,
    EmbedReply,
    EmbedRequest,
    ExtractReply,
    ExtractRequest,
    Server,
)  # fmt: skip
from kernelm_gateway.exchange import Exchange
from kernelm_gateway.gate import Gate
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import ClientFault, invalid
from kernelm_sdk.system import Key

CLASSIFY, EMBED, EXTRACT = map(method_of, (Server.classify, Server.embed, Server.extract))
Natural = Annotated[int, msgspec.Meta(ge=0)]


class ClassifyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to classify, and by which deployment."""

    model: str
    input: str | list[str]
    top: Natural = 0  # the best so many labels a text; 0 for all
    at_least: Natural = 0  # refuse with 409 if the deployment's generation is lower


class ExtractBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """In which texts to find entities, and by which deployment."""

    model: str
    input: str | list[str]
    at_least: Natural = 0


class EmbeddingsBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's request; `dimensions` is not supported, `user` is not used."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"  # base64: of little-endian float32
    dimensions: int | None = None
    user: str = ""
    at_least: Natural = 0


class Embedding(msgspec.Struct, frozen=True):
    index: int
    embedding: tuple[float, ...] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, frozen=True):
    """OpenAI's answer, and which generation and artifact gave it."""

    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    generation: int
    artifact: str  # digest
    object: Literal["list"] = "list"


async def classify(gate: Gate, key: Key, body: ClassifyBody, exchange: Exchange) -> None:
    request = ClassifyRequest(_texts(body.input), body.model, body.top, body.at_least)
    reply: ClassifyReply = await gate.call(key, CLASSIFY, request, body.model, exchange.wanted_s)
    await exchange.reply(reply)


async def extract(gate: Gate, key: Key, body: ExtractBody, exchange: Exchange) -> None:
    request = ExtractRequest(_texts(body.input), body.model, body.at_least)
    reply: ExtractReply = await gate.call(key, EXTRACT, request, body.model, exchange.wanted_s)
    await exchange.reply(reply)


async def embed(gate: Gate, key: Key, body: EmbeddingsBody, exchange: Exchange) -> None:
    if body.dimensions is not None:
        raise ClientFault("invalid", "dimensions: a model has one size only", "leave `dimensions` out", param="dimensions")
    request = EmbedRequest(_texts(body.input), body.model, body.at_least)
    reply: EmbedReply = await gate.call(key, EMBED, request, body.model, exchange.wanted_s)
    form = _base64 if body.encoding_format == "base64" else tuple
    await exchange.reply(Embeddings([Embedding(index, form(row)) for index, row in enumerate(reply.embeddings)], reply.model,
                                    EmbeddingsUsage(reply.tokens, reply.tokens), reply.generation, reply.artifact))  # fmt: skip


def _texts(given: str | list[str]) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given)
    if not texts:
        raise invalid("input", ValueError("there is no text in it"), "send a text or a list of texts")
    return texts


def _base64(row: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()
