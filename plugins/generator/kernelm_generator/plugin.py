"""The generative server's handlers. Torch and transformers are imported with the first model: an idle instance has neither."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from kernelm_contracts.admission import deadline, ms_since, owner, require_served, require_texts
from kernelm_contracts.loading import tell_loading
from kernelm_contracts.server import (
    EmbedReply,
    EmbedRequest,
    GenerateFrame,
    GenerateRequest,
    InfoRequest,
    ServedModel,
    Server,
    ServerInfo,
    Usage,
)  # fmt: skip
from kernelm_generator.settings import Finish
from kernelm_generator.settings import Settings as GeneratorSettings
from kernelm_sdk.errors import ClientFault, KernelFault
from kernelm_sdk.plugin import Call, Plugin

if TYPE_CHECKING:
    from kernelm_generator.engine import Engine
    from kernelm_generator.memory import Plan
    from kernelm_generator.model import Model


class GeneratorPlugin(Plugin, Server):
    """Serves the model of its settings."""

    Settings = GeneratorSettings
    settings: GeneratorSettings
    _engine: "Engine | None" = None
    _model: "Model"
    _plan: "Plan"

    async def on_start(self) -> None:
        if (served := self.settings.model) is not None:
            await tell_loading(self.context, served, 0.0, "opening the model")
            folder = await self.context.artifact(served.artifact)
            await tell_loading(self.context, served, 0.2, "loading the weights")
            await asyncio.to_thread(self._load, folder)
            await tell_loading(self.context, served, 1.0, "ready")

    def _load(self, folder: Path) -> None:
        from kernelm_generator.engine import Engine
        from kernelm_generator.loading import load

        threads = self.settings.threads or self.context.threads
        self._model, self._plan = load(folder, self.settings, self.context.memory_mb, threads, self.context.log)
        self._engine = Engine(self._model, self._plan, self.settings.prefill_tokens, self.settings.queue, self.context.log)

    async def on_stop(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,) if self.settings.model else ()

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncIterator[GenerateFrame]:
        began, until = time.perf_counter(), deadline(call)
        served, engine = self._admit(request, call)
        from kernelm_generator.prompts import check, read

        check(request, self._plan)
        asked = await asyncio.to_thread(read, request, self._model, self._plan, owner(call))
        answer = engine.submit(asked)
        finish: Finish = ""
        first_ms, held = 0.0, ""
        try:
            async with asyncio.timeout_at(until), aclosing(engine.pieces(answer)) as pieces:
                yield GenerateFrame()  # before it waits: who is gone already shall not have a slot
                async for piece in pieces:
                    finish = piece.finish
                    if piece.text:
                        first_ms = first_ms or ms_since(began)
                        held += piece.text
                    if held and (request.stream or finish):
                        yield GenerateFrame(held)
                        held = ""
        except TimeoutError:
            raise KernelFault("timeout", "the caller's deadline has passed", "give it longer, or ask for less",
                              retriable=True) from None  # fmt: skip
        usage = Usage(len(asked.prompt), len(answer.made), answer.cached)
        yield GenerateFrame("", finish, usage, served.name, served.generation, served.artifact, first_ms, ms_since(began))

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedReply:
        started = time.perf_counter()
        served, engine = self._admit(request, call)
        require_texts(request.input)
        if len(request.input) > self.settings.queue:
            raise ClientFault("too_large", f"`input` has {len(request.input)} texts, and the queue holds {self.settings.queue}",
                              "send them in several calls")  # fmt: skip
        texts = [await asyncio.to_thread(self._model.cut, text, self._plan.context) for text in request.input]
        vectors = [await engine.run(partial(self._model.mean_state, tokens)) for tokens in texts]
        return EmbedReply(served.name, served.generation, served.artifact, tuple(map(tuple, vectors)), sum(map(len, texts)),
                          ms_since(started))  # fmt: skip

    async def info(self, request: InfoRequest, call: Call) -> ServerInfo:
        served, _ = self._admit(request, call)
        model, plan = self._model, self._plan
        details = {
            "structure": model.network.config.model_type, "parameters": f"{model.parameters:,}", "precision": model.precision,
            "device": str(model.device), "library": f"transformers {version('transformers')}", "slots": str(plan.slots),
            "memory_mb": str(plan.needed_mb), "chat": "yes" if model.tokenizer.chat_template else "no template",
        }  # fmt: skip
        context = plan.context + plan.max_tokens * model.encodes
        return ServerInfo(served.name, served.generation, served.artifact, ("embed", "generate"), context, plan.max_tokens, details)

    def _admit(self, request: GenerateRequest | EmbedRequest | InfoRequest, call: Call) -> "tuple[ServedModel, Engine]":
        """What this instance serves, if the request may have it: right name, young enough."""
        served = require_served(self.settings.model, request, call, self.context.pool)
        assert self._engine is not None  # started, since it serves
        return served, self._engine
