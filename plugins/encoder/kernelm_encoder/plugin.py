"""The encoder server's handlers. Compute libraries are imported at first use: an idle instance has none."""

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING

from kernelm_contracts.admission import ms_since, require_served, require_texts
from kernelm_contracts.loading import tell_loading
from kernelm_contracts.server import (
    ClassifyReply,
    ClassifyRequest,
    EmbedReply,
    EmbedRequest,
    ExtractReply,
    ExtractRequest,
    InfoRequest,
    Measured,
    MeasureRequest,
    ServedModel,
    Server,
    ServerInfo,
)  # fmt: skip
from kernelm_encoder.settings import Settings as EncoderSettings
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call, Job, Plugin

if TYPE_CHECKING:
    from kernelm_encoder.batching import Answer, Batcher
    from kernelm_encoder.model import Model


class EncoderPlugin(Plugin, Server):
    """Serves the model of its settings, if it has one, and measures any."""

    Settings = EncoderSettings
    settings: EncoderSettings
    _batcher: "Batcher | None" = None
    _model: "Model"

    async def on_start(self) -> None:
        if (served := self.settings.model) is None:
            return
        await tell_loading(self.context, served, 0.0, "opening the model")
        from kernelm_encoder.batching import Batcher
        from kernelm_encoder.model import open_model

        folder = await self.context.artifact(served.artifact)
        self._model = await asyncio.to_thread(open_model, folder, self.settings.threads or self.context.threads)
        self._batcher = Batcher(self._model, self.settings, self.context.log)
        await tell_loading(self.context, served, 1.0, "ready")

    async def on_stop(self) -> None:
        if self._batcher is not None:
            await asyncio.to_thread(self._batcher.close)

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,) if self.settings.model else ()

    async def classify(self, request: ClassifyRequest, call: Call) -> ClassifyReply:
        started = perf_counter()
        served = self._admit(request, call)
        if self._model.extracts or not self._model.card.labels:
            raise self._lacks("has no labels for texts", "deploy a text classifier")
        if request.top < 0:
            raise ClientFault("invalid", f"`top` is {request.top}", "ask for the best 1 or more labels, or 0 for all")
        answer = await self._answer(request.input)
        from kernelm_encoder.answers import rank

        card = self._model.card
        results = rank(answer.output.logits, card.labels, request.top, multi=card.problem == "multi-label")
        return ClassifyReply(served.name, served.generation, served.artifact, results, answer.tokens, ms_since(started))

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedReply:
        started = perf_counter()
        served = self._admit(request, call)
        if not self._model.embeds:
            raise self._lacks("has no embeddings", "deploy an encoder in safetensors format")
        answer = await self._answer(request.input)
        from kernelm_encoder.answers import unit_length

        assert answer.output.embeddings is not None
        vectors = unit_length(answer.output.embeddings)
        return EmbedReply(served.name, served.generation, served.artifact, vectors, answer.tokens, ms_since(started))

    async def extract(self, request: ExtractRequest, call: Call) -> ExtractReply:
        started = perf_counter()
        served = self._admit(request, call)
        if not self._model.extracts:
            raise self._lacks("finds no entities", "deploy a model of the structure \"token-classification\"")
        answer = await self._answer(request.input)
        found = tuple(answer.output.entities)
        return ExtractReply(served.name, served.generation, served.artifact, found, answer.tokens, ms_since(started))

    def _lacks(self, what: str, remedy: str) -> ClientFault:
        card = self._model.card
        return ClientFault("unsupported_method", f"model {card.name!r} ({card.structure}, {card.format}) {what}", remedy)

    async def info(self, request: InfoRequest, call: Call) -> ServerInfo:
        served = self._admit(request, call)
        card = self._model.card
        details = {"structure": card.structure, "format": card.format, "precision": card.precision,
                   "parameters": f"{card.parameters:,}", "labels": ", ".join(card.labels)}  # fmt: skip
        has = {"classify": bool(card.labels) and not self._model.extracts, "embed": self._model.embeds,
               "extract": self._model.extracts}  # fmt: skip
        methods = tuple(method for method, there in has.items() if there)
        return ServerInfo(served.name, served.generation, served.artifact, methods, card.max_tokens, details=details)

    async def measure(self, request: MeasureRequest, job: Job) -> Measured:
        from kernelm_encoder.measuring import check_request, measure

        check_request(request)
        dataset = await self.context.artifact(request.dataset)
        models = {digest: await self.context.artifact(digest) for digest in request.models}
        return await job.in_thread(measure, request, models, dataset, self.settings.max_batch, job)

    def _admit(self, request: ClassifyRequest | EmbedRequest | ExtractRequest | InfoRequest, call: Call) -> ServedModel:
        """What this instance serves, if the request may have it: right name, young enough, with texts if it has any."""
        served = require_served(self.settings.model, request, call, self.context.pool)
        if isinstance(request, InfoRequest):
            return served
        require_texts(request.input)
        return served

    async def _answer(self, texts: tuple[str, ...]) -> "Answer":
        assert self._batcher is not None  # started, since it serves
        return await asyncio.wrap_future(self._batcher.submit(texts))
