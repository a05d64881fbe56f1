"""The encoder server's handlers. Compute libraries are imported at first use: an idle instance has none."""

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING

from kernelm_contracts.server import (
    ClassifyReply,
    ClassifyRequest,
    EmbedReply,
    EmbedRequest,
    Measured,
    MeasureRequest,
    ServedModel,
    Server,
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
        if self.settings.model is None:
            return
        from kernelm_encoder.batching import Batcher
        from kernelm_encoder.model import open_model

        folder = await self.context.artifact(self.settings.model.artifact)
        self._model = await asyncio.to_thread(open_model, folder, self.settings.threads or self.context.threads)
        self._batcher = Batcher(self._model, self.settings, self.context.log)

    async def on_stop(self) -> None:
        if self._batcher is not None:
            await asyncio.to_thread(self._batcher.close)

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,) if self.settings.model else ()

    async def classify(self, request: ClassifyRequest, call: Call) -> ClassifyReply:
        started = perf_counter()
        served = self._admit(request, call)
        if request.top < 0:
            raise ClientFault("invalid", f"`top` is {request.top}", "ask for the best 1 or more labels, or 0 for all")
        answer = await self._answer(request.input)
        from kernelm_encoder.answers import rank

        results = rank(answer.output.logits, self._model.card.labels, request.top)
        return ClassifyReply(served.name, served.generation, served.artifact, results, answer.tokens, _ms_since(started))

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedReply:
        started = perf_counter()
        served = self._admit(request, call)
        if not self._model.embeds:
            card = self._model.card
            raise ClientFault("unsupported_method", f"model {served.name!r} ({card.structure}, {card.format}) has no "
                              "embeddings", "deploy an encoder in safetensors format")  # fmt: skip
        answer = await self._answer(request.input)
        from kernelm_encoder.answers import unit_length

        assert answer.output.embeddings is not None
        vectors = unit_length(answer.output.embeddings)
        return EmbedReply(served.name, served.generation, served.artifact, vectors, answer.tokens, _ms_since(started))

    async def measure(self, request: MeasureRequest, job: Job) -> Measured:
        from kernelm_encoder.measuring import check_request, measure

        check_request(request)
        dataset = await self.context.artifact(request.dataset)
        models = {digest: await self.context.artifact(digest) for digest in request.models}
        return await job.in_thread(measure, request, models, dataset, self.settings.max_batch, job)

    def _admit(self, request: ClassifyRequest | EmbedRequest, call: Call) -> ServedModel:
        """What this instance serves, if the request may have it: right name, young enough, with texts."""
        served = self.settings.model
        asked = call.model or request.model
        if served is None or (asked and asked != served.name):
            raise ClientFault("unknown_model", f"model {asked!r} is not served here; " + (
                f"{served.name!r} is" if served else "this instance serves none"),
                "`kernelm model list` shows what is deployed")  # fmt: skip
        if served.generation < request.at_least:
            raise ClientFault("stale_generation", f"model {served.name!r} is at generation {served.generation} in pool "
                              f"{self.context.pool!r}, older than `at_least` {request.at_least}", "call again: the "
                              "route may be on its way", retriable=True, generation=served.generation,
                              pool=self.context.pool)  # fmt: skip
        for row, text in enumerate(request.input):
            if not text.strip():
                raise ClientFault("invalid", f"`input[{row}]` is blank", "leave it out")
        if not request.input:
            raise ClientFault("invalid", "`input` is empty", "send at least one text")
        return served

    async def _answer(self, texts: tuple[str, ...]) -> "Answer":
        assert self._batcher is not None  # started, since it serves
        return await asyncio.wrap_future(self._batcher.submit(texts))


def _ms_since(started: float) -> float:
    return round((perf_counter() - started) * 1e3, 3)
