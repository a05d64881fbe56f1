"""Serves a GGUF with llama.cpp (xllamacpp): the text comes as it is made, and whoever is gone stops the work."""

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llamacpp_engine import Engine, EngineLost
from msgspec import Struct

from kernelm_contracts.server import GenerateFrame, GenerateRequest, InfoRequest, ServedModel, Server, ServerInfo, Usage
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.plugin import Call, Plugin

SEEDS = 2**32 - 1  # llama.cpp takes the last one for "any"
NOT_HERE = ("tools", "tool_choice", "adapter")


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    model: ServedModel | None = None  # an artifact with one GGUF; without it nothing is served
    context: int = 2048  # tokens, prompt and answer together, of one call
    max_tokens: int = 512  # of one answer
    slots: int = 2  # calls that are worked on at a time
    queue: int = 32  # calls that wait for a slot; more are refused with `busy`
    threads: int = 0  # 0 for as many as the instance may use


class LlamaServer(Plugin, Server):
    Settings = Settings
    settings: Settings

    async def on_start(self) -> None:
        if (model := self.settings.model) is None:
            return
        self.file = gguf(await self.context.artifact(model.artifact))
        s, threads = self.settings, self.settings.threads or self.context.threads or os.cpu_count()
        try:
            self.engine = await Engine.start(model=str(self.file), context=s.context, slots=s.slots, threads=threads,
                                             max_tokens=s.max_tokens)  # fmt: skip
        except EngineLost as error:
            raise PluginFault("invalid_model", f"{self.file.name}: {error}", "see the lines before this one") from None
        # without its engine an instance is worth nothing: the system starts another
        self.engine.ended.add_done_callback(lambda _: signal.raise_signal(signal.SIGTERM))

    async def on_stop(self) -> None:
        if self.settings.model is not None:
            await self.engine.close()

    def models(self) -> tuple[str, ...]:
        return (self.settings.model.name,) if self.settings.model else ()

    async def info(self, request: InfoRequest, call: Call) -> ServerInfo:
        model, size = self.admit(request, call), self.file.stat().st_size >> 20
        details = {"file": self.file.name, "megabytes": str(size), "library": f"xllamacpp {version('xllamacpp')}"}
        return ServerInfo(model.name, model.generation, model.artifact, ("generate",), self.settings.context,
                          self.settings.max_tokens, details)  # fmt: skip

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncIterator[GenerateFrame]:
        began, model = time.perf_counter(), self.admit(request, call)
        answer = engine_request(request, self.settings)
        if (waiting := self.engine.calls - self.settings.slots) >= self.settings.queue:
            raise ClientFault("busy", f"{waiting} calls are waiting already", "call again later", retriable=True)
        finish, usage, first_ms = "", Usage(0, 0), 0.0
        yield GenerateFrame()  # who is gone already shall not wait for a slot
        try:
            async with aclosing(self.engine.stream(bool(request.messages), answer)) as chunks:
                async for chunk in chunks:
                    text, reason, counted = parts(chunk)
                    finish, usage = reason or finish, counted or usage
                    if text:
                        first_ms = first_ms or ms(began)
                        yield GenerateFrame(text)
        except EngineLost as error:
            raise PluginFault("engine", str(error), "call again", retriable=True) from None
        yield GenerateFrame("", finish, usage, model.name, model.generation, model.artifact, first_ms, ms(began))

    def admit(self, request: GenerateRequest | InfoRequest, call: Call) -> ServedModel:
        model, asked = self.settings.model, call.model or request.model
        if model is None or (asked and asked != model.name):
            raise ClientFault("unknown_model", f"{asked!r} is not served here", "kernelm model list")
        if request.at_least > model.generation:
            raise ClientFault("stale_generation", f"this is generation {model.generation}", "call again", retriable=True)
        return model


def gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise PluginFault("invalid_model", f"the artifact holds {len(files)} files *.gguf", "deploy a folder with one")
    return files[0]


def engine_request(request: GenerateRequest, settings: Settings) -> dict[str, Any]:
    """What llama.cpp is asked for; ClientFault for what has no meaning."""
    given = [field for field in NOT_HERE if getattr(request, field)] + ["tool_calls" for m in request.messages if m.tool_calls]
    if given:
        raise ClientFault("unsupported_parameter", f"`{given[0]}` is given", "leave it out, or deploy with a plugin that has it")
    most = request.max_tokens or settings.max_tokens
    for wrong, what, remedy in (
        (bool(request.messages) == bool(request.prompt), "exactly one of `messages` and `prompt` must be given", "leave one out"),
        (not 1 <= most <= settings.max_tokens, f"`max_tokens` is {most}", f"1 to {settings.max_tokens}, or 0 for that"),
        (not 0 <= request.temperature <= 100, f"`temperature` is {request.temperature}", "0 to 2 is usual"),
        (not 0 < request.top_p <= 1, f"`top_p` is {request.top_p}", "above 0, at most 1"),
        (not all(request.stop), "`stop` holds an empty string", "leave it out"),
        (request.top_k < 0, f"`top_k` is {request.top_k}", "1 or more, or 0 for all"),
        (not -2 <= request.presence_penalty <= 2, f"`presence_penalty` is {request.presence_penalty}", "-2 to 2"),
        (not -2 <= request.frequency_penalty <= 2, f"`frequency_penalty` is {request.frequency_penalty}", "-2 to 2"),
    ):
        if wrong:
            raise ClientFault("invalid", what, remedy)
    turns = [{"role": message.role, "content": message.content} for message in request.messages]
    wanted = {"messages": turns} if turns else {"prompt": request.prompt}
    names = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")
    sampling = {**{name: getattr(request, name) for name in names}, "stop": list(request.stop), "max_tokens": most}
    if request.schema:
        sampling["json_schema"] = request.schema
    seed = {} if request.seed is None else {"seed": request.seed % SEEDS}
    return {**wanted, **sampling, **seed, "stream": True, "stream_options": {"include_usage": True}}


def parts(chunk: dict[str, Any]) -> tuple[str, str, Usage | None]:
    """(text, finish reason, usage) of one chunk of OpenAI's form; ClientFault for the engine's own refusal."""
    if error := chunk.get("error"):
        if error["type"] == "exceed_context_size_error":
            raise ClientFault("too_large", f"the prompt has {error['n_prompt_tokens']} tokens, and the context {error['n_ctx']}",
                              "send less")  # fmt: skip
        if error["code"] < 500:
            raise ClientFault("invalid", error["message"][:200], "see llama.cpp's own words")
        raise PluginFault("engine", error["message"][:200], "see the log of the instance", retriable=True)
    usage = None
    if counted := chunk.get("usage"):
        cached = counted.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        usage = Usage(counted["prompt_tokens"], counted["completion_tokens"], cached)
    choice = next(iter(chunk["choices"]), {})
    return choice.get("text") or choice.get("delta", {}).get("content") or "", choice.get("finish_reason") or "", usage


def ms(began: float) -> float:
    return round((time.perf_counter() - began) * 1e3, 2)
