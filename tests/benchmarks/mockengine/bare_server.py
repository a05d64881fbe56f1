"""The mock engine's own HTTP server, with nothing between: chats in OpenAI's form, for benchmarks of what stands before it."""

from contextlib import aclosing
from typing import Any

import msgspec
from mock_engine import MockEngine

from kernelm_contracts.server import GenerateFrame
from kernelm_gateway.answers import ChatAnswer
from kernelm_gateway.completions import ChatBody
from kernelm_gateway.exchange import Exchange, read
from kernelm_sdk.errors import Fault

LARGEST = 10_000_000


def make_app(model: dict[str, Any]) -> Any:
    """An ASGI application that answers every path."""
    no_context: Any = None  # the engine asks nothing of the system
    engine = MockEngine(no_context, msgspec.convert({"model": model}, MockEngine.Settings))
    decoder, started = msgspec.json.Decoder(ChatBody), False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal started
        if not started:
            await engine.on_start()
            started = True
        exchange = Exchange(scope, receive, send)
        try:
            await answer(exchange)
        except Fault as fault:
            await exchange.refuse(fault)

    async def answer(exchange: Exchange) -> None:
        body = read(decoder, await exchange.body(LARGEST))
        form, text, frame = ChatAnswer(body.model), "", GenerateFrame()
        async with aclosing(engine.generate(body.request(), None)) as frames:  # type: ignore[arg-type, type-var]
            async for frame in frames:
                if not body.stream:
                    text += frame.text
                elif events := form.events(frame):
                    await exchange.write(events)
        if body.stream:
            await exchange.end(form.ending(frame, body.stream_options is not None))
        else:
            await exchange.reply(form.whole(text, [], frame))

    return app
