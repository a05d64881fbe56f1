"""The retriever's handlers. numpy and pyarrow are imported with the first index: an idle instance has neither."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec

from kernelm_contracts.admission import ms_since, require_served
from kernelm_contracts.loading import tell_loading
from kernelm_contracts.retriever import (
    AnswerFrame,
    AnswerRequest,
    DocumentsIndexed,
    Indexed,
    IndexRequest,
    RecommendReply,
    RecommendRequest,
    Retriever,
    SearchReply,
    SearchRequest,
    Source,
)
from kernelm_contracts.server import GenerateFrame, ServedModel
from kernelm_retriever.settings import Settings as RetrieverSettings
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call, Job, Plugin

if TYPE_CHECKING:
    from kernelm_retriever.index import Array, Index

KIND = "index"
MOST = 100  # sources of an answer


class RetrieverPlugin(Plugin, Retriever):
    """Makes indexes, and serves that of its settings."""

    Settings = RetrieverSettings
    settings: RetrieverSettings
    _index: "Index"

    async def on_start(self) -> None:
        if (served := self.settings.model) is not None:
            await tell_loading(self.context, served, 0.0, "opening the index")
            from kernelm_retriever.index import Index

            folder = await self.context.artifact(served.artifact)
            self._index = await asyncio.to_thread(Index.load, folder)
            await tell_loading(self.context, served, 1.0, "ready")

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,) if self.settings.model else ()

    async def index(self, request: IndexRequest, job: Job) -> Indexed:
        from kernelm_retriever.indexing import check, make

        began = time.perf_counter()
        check(request)
        dataset = await self.context.artifact(request.dataset)
        folder, card = await make(request, dataset, job, self.settings.checkpoint_every_s)
        metadata = {"name": card.name, "documents": card.documents, "passages": card.passages}
        digest = await self.context.store(folder, KIND, metadata, job=job.id, dataset=request.dataset, model=request.model)
        await self.context.publish(DocumentsIndexed(name=card.name, index=digest, documents=card.documents,
                                                    passages=card.passages))  # fmt: skip
        return Indexed(digest, card.documents, card.passages, card.dimensions, round(time.perf_counter() - began, 1))

    async def search(self, request: SearchRequest, call: Call) -> SearchReply:
        began = time.perf_counter()
        served = self._admit(request, call)
        sources = await self._nearest(request.query, "query", request.top, call)
        return SearchReply(served.name, served.generation, served.artifact, sources, ms_since(began))

    async def recommend(self, request: RecommendRequest, call: Call) -> RecommendReply:
        began = time.perf_counter()
        served = self._admit(request, call)
        _check_top(request.top)
        if not request.documents and not request.text.strip():
            raise ClientFault("invalid", "neither `documents` nor `text` is given", "say what the recommendations shall be like")
        vector = await self._vector(request.text, call) if request.text.strip() else None
        sources = await asyncio.to_thread(self._index.recommend, request.documents, vector, request.top)
        return RecommendReply(served.name, served.generation, served.artifact, sources, ms_since(began))

    async def answer(self, request: AnswerRequest, call: Call) -> AsyncIterator[AnswerFrame]:
        began = time.perf_counter()
        served = self._admit(request, call)
        if not self.settings.generator:
            raise ClientFault("unsupported_method", f"{served.name!r} has no generator, and so no answers",
                              'deploy it with settings = { generator = "..." }; `search` needs none')  # fmt: skip
        if request.max_tokens < 0:
            raise ClientFault("invalid", f"`max_tokens` is {request.max_tokens}", "1 or more, or 0 for the server's own limit")
        nearest = await self._nearest(request.question, "question", request.top, call)
        sources = tuple(source for source in nearest if source.score >= self.settings.least_score)
        last = AnswerFrame(model=served.name, generation=served.generation, artifact=served.artifact)
        if not sources:
            yield _ended(last, "no_source", began)
            return
        yield AnswerFrame(sources)
        from kernelm_retriever import asking, prompts

        asked = prompts.ask(request.question, sources, self.settings, request.max_tokens)
        piece = GenerateFrame()
        async with aclosing(asking.frames(self.context, asked, self.settings.generator, call)) as pieces:
            async for piece in pieces:
                if piece.text:
                    yield AnswerFrame(text=piece.text)
        yield _ended(last, "length" if piece.finish_reason == "length" else "stop", began, piece)

    async def _nearest(self, text: str, field: str, top: int, call: Call) -> tuple[Source, ...]:
        _check_top(top)
        if not text.strip():
            raise ClientFault("invalid", f"`{field}` is blank", "ask for something")
        vector = await self._vector(text, call)
        return await asyncio.to_thread(self._index.search, vector, top)

    async def _vector(self, text: str, call: Call) -> "Array":
        from kernelm_retriever.asking import vectors

        card = self._index.card
        vector: Array = (await vectors(self.context, [text], card.embedder, card.model, call))[0]
        return vector

    def _admit(self, request: SearchRequest | RecommendRequest | AnswerRequest, call: Call) -> ServedModel:
        """What this instance serves, if the request may have it: right name, young enough."""
        return require_served(self.settings.model, request, call, self.context.pool)


def _check_top(top: int) -> None:
    if not 1 <= top <= MOST:
        raise ClientFault("invalid", f"`top` is {top}", f"1 to {MOST}")


def _ended(frame: AnswerFrame, reason: str, began: float, piece: GenerateFrame | None = None) -> AnswerFrame:
    of_generator = {"usage": piece.usage, "generator": piece.artifact} if piece else {}
    return msgspec.structs.replace(frame, finish_reason=reason, took_ms=ms_since(began), **of_generator)
