"""An engine whose answers and time are known: the words "w0 w1 w2 ...", one a token, at a pace that is set.

Its time is that of engines in form: `slots` calls at a time, the others wait; each token of a prompt costs `prompt_ms`, unless
the prompt begins with one that was read before (a cache of `cached` beginnings, the oldest goes first), and each token of an
answer `token_ms`. With everything at 0 it costs next to nothing, so that what is measured is the way to it.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from msgspec import Struct

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
    ToolCall,
    Usage,
)
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.plugin import Call, Plugin

BLOCK = 256  # characters of a prompt that are cached together


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    model: ServedModel
    token_ms: float = 0.0
    step_ms: float = 0.0  # after which all calls get a token at once, as from an engine that batches; in place of `token_ms`
    prompt_ms: float = 0.0  # a token; a prompt has a token every four characters
    slots: int = 0  # calls at a time; 0 for all that come
    queue: int = 1000  # calls that wait for a slot; more are refused
    cached: int = 0  # blocks of prompts that are remembered
    max_tokens: int = 100_000
    fails_after: int = 0  # tokens of an answer, with a fault; 0 for never


class MockEngine(Plugin, Server):
    Settings = Settings
    settings: Settings

    async def on_start(self) -> None:
        self.generated = self.active = self.hits = self.read = 0
        self._slots = asyncio.Semaphore(self.settings.slots or 1_000_000)
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._step = asyncio.Event()
        self._steps = asyncio.create_task(self._run()) if self.settings.step_ms else None

    async def on_stop(self) -> None:
        if self._steps is not None:
            self._steps.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.settings.step_ms / 1e3)  # the engine's own pace
            step, self._step = self._step, asyncio.Event()
            step.set()

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,)

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncIterator[GenerateFrame]:
        served, s, began = self.settings.model, self.settings, time.perf_counter()
        if s.slots and self.active - s.slots >= s.queue:
            raise ClientFault("busy", "the queue is full", "call again later", retriable=True)
        prompt = request.prompt or "\n".join(f"{m.role}: {m.content}" for m in request.messages)
        size, count = max(1, len(prompt) // 4), request.max_tokens or 16
        if count > s.max_tokens:
            raise ClientFault("invalid", f"`max_tokens` is {count}", f"1 to {s.max_tokens}")
        self.active += 1
        try:
            if s.slots:
                yield GenerateFrame()
            async with self._slots:
                hit = await self._prefill(prompt, size)
                if request.tools and request.tool_choice != "none":
                    name = next((t.name for t in request.tools if t.name == request.tool_choice), request.tools[0].name)
                    yield GenerateFrame(tool_calls=(ToolCall("call-1", name, '{"word":"w0"}'),))
                    count, finish = 1, "tool_calls"
                elif request.stream or s.token_ms or s.fails_after:
                    for k in range(count):
                        if s.fails_after and k == s.fails_after:
                            raise PluginFault("engine", "the engine was told to fail", "call again", retriable=True)
                        if s.step_ms:
                            await self._step.wait()
                        elif s.token_ms:
                            await asyncio.sleep(s.token_ms / 1e3)  # the engine's own pace
                        self.generated += 1
                        yield GenerateFrame(_word(k))
                    finish = "length"
                else:
                    self.generated += count
                    yield GenerateFrame("".join(map(_word, range(count))), "length", Usage(size, count, hit), served.name,
                                        served.generation, served.artifact)  # fmt: skip
                    return
            took_ms = (time.perf_counter() - began) * 1e3
            yield GenerateFrame("", finish, Usage(size, count, hit), served.name, served.generation, served.artifact, 0.0, took_ms)
        finally:
            self.active -= 1

    async def _prefill(self, prompt: str, size: int) -> int:
        """Read the prompt; how many of its tokens were read before."""
        s, hit, value = self.settings, 0, 0
        if s.prompt_ms or s.cached:
            for at in range(BLOCK, len(prompt) + 1, BLOCK):
                value = hash((value, prompt[at - BLOCK : at]))
                if value in self._cache and hit == (at - BLOCK) // 4:
                    hit = at // 4
                    self._cache.move_to_end(value)
                elif s.cached:
                    self._cache[value] = None
            while len(self._cache) > s.cached:
                self._cache.popitem(last=False)
            await asyncio.sleep((size - hit) * s.prompt_ms / 1e3)  # the engine's own pace
        self.hits, self.read = self.hits + hit, self.read + size
        return hit

    async def classify(self, request: ClassifyRequest, call: Any) -> ClassifyReply:
        served = self.settings.model
        rows = tuple((Label(text.split()[0] if text.split() else "", 1.0),) for text in request.input)
        return ClassifyReply(served.name, served.generation, served.artifact, rows, len(rows), 0.0)

    async def embed(self, request: EmbedRequest, call: Any) -> EmbedReply:
        served = self.settings.model
        rows = tuple((0.6, 0.8) for _ in request.input)
        return EmbedReply(served.name, served.generation, served.artifact, rows, len(rows), 0.0)

    async def info(self, request: InfoRequest, call: Any) -> ServerInfo:
        served = self.settings.model
        counted = {"generated": self.generated, "active": self.active, "cached_tokens": self.hits, "prompt_tokens": self.read}
        return ServerInfo(served.name, served.generation, served.artifact, ("classify", "embed", "generate"), 100_000,
                          self.settings.max_tokens, {name: str(value) for name, value in counted.items()})  # fmt: skip


def _word(k: int) -> str:
    return f" w{k}" if k else "w0"
