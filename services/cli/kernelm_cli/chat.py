"""`kernelm chat NAME`: talk with a deployed model in the terminal."""

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from kernelm_cli import faults
from kernelm_cli.session import Common, connection, print_piece
from kernelm_cli.swapping import state_of
from kernelm_contracts.server import GenerateFrame, GenerateRequest, Message, Server
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault, Fault, KernelFault

FIRST_S = 300.0  # for the next piece of an answer
PATIENCE_S = 120.0  # for a model that is not loaded at the moment


def chat(name: Annotated[str, Parameter(name="NAME")],
         text: Annotated[str, Parameter(name="TEXT", allow_leading_hyphen=True)] = "", /, *, common: Common = Common(),
         system: str = "", temperature: float = 0.7, max_tokens: int = 0, seed: int | None = None) -> int:  # fmt: skip
    """Talk with the deployment NAME; with TEXT ask one thing and end.

    Ctrl-C stops an answer, Ctrl-D ends the talk, /new begins another one.

    Parameters
    ----------
    system
        What the model is told before the talk.
    temperature
        0 for always the likeliest word.
    max_tokens
        Of an answer; 0 for the server's own limit.
    seed
        For the same answers each time.
    """
    settings = GenerateRequest(temperature=temperature, max_tokens=max_tokens, seed=seed)
    talk = Talk(common, name, settings, system)
    if text:
        talk.say(text)
        return 0
    people = sys.stdin.isatty()
    if people:
        with suppress(ImportError):
            import readline  # noqa: F401 # lines can be edited and found again
    while True:
        try:
            line = input("> " if people else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            return faults.INTERRUPTED
        if line == "/new":
            talk = Talk(common, name, settings, system)
        elif line:
            try:
                talk.say(line)
            except Fault as fault:  # the talk can go on
                faults.show(fault)
                if not people:
                    return faults.exit_code(fault)


class Talk:
    """The turns so far."""

    def __init__(self, common: Common, name: str, settings: GenerateRequest, system: str) -> None:
        self._common, self._name, self._settings = common, name, settings
        self._turns: tuple[Message, ...] = (Message("system", system),) if system else ()

    def say(self, text: str) -> None:
        """Print the answer as it comes; what Ctrl-C cuts off stays as it is. A turn that has failed is forgotten."""
        asked = (*self._turns, Message("user", text))
        pieces: list[str] = []
        with suppress(KeyboardInterrupt):
            asyncio.run(self._answer(asked, pieces.append))
        print(flush=True)
        self._turns = (*asked, Message("assistant", "".join(pieces)))

    async def _answer(self, turns: tuple[Message, ...], add: Callable[[str], None]) -> None:
        request = msgspec.structs.replace(self._settings, messages=turns)
        async with connection(self._common.folder) as bus:
            last = await _stream(bus, self._name, request, lambda text: (add(text), print_piece(text)))
        if last.usage is not None and sys.stderr.isatty():
            usage, seconds = last.usage, max(last.took_ms - last.first_ms, 1.0) / 1e3
            Console(stderr=True).print(Text(f"\n{last.model} generation {last.generation}, {usage.prompt_tokens} tokens read "
                                            f"({usage.cached_tokens} known), {usage.completion_tokens} made, "
                                            f"{usage.completion_tokens / seconds:.1f}/s", "dim"))  # fmt: skip


async def _require(bus: Bus, name: str) -> None:
    """ClientFault "unknown_model" for a deployment that neither is there nor is being made: it would be waited for in vain."""
    state = await state_of(bus)
    made = {route for swap in state.swaps if not swap.over for route in swap.routes}
    if name not in made and not any(route.kind == "model" and route.name == name for route in state.routes):
        raise ClientFault("unknown_model", f"no deployment {name!r} answers", "kernelm model list")


async def _stream(bus: Bus, name: str, request: GenerateRequest, show: Callable[[str], object]) -> GenerateFrame:
    """The last frame; what is not there yet (a model that is being loaded) is waited for."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            frame = GenerateFrame()
            async with aclosing(bus.stream(Server.generate, request, model=name, idle_s=FIRST_S)) as frames:
                async for frame in frames:
                    show(frame.text)
            return frame
        except ClientFault as fault:
            if fault.code != "unsupported_method" or fault.remedy:
                raise
            raise ClientFault(fault.code, f"{name!r} writes no text", "`kernelm call` asks it for labels or entities") from None
        except KernelFault as fault:
            if fault.code == "no_responders":
                await _require(bus, name)
            if not fault.retriable or fault.code == "timeout" or time.monotonic() > until:
                raise
            await asyncio.sleep(min(float(fault.details.get("retry_after_s", 1.0)), 5.0))
