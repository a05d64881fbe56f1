"""`kernelm search | ask | recommend NAME ...`: what a deployed index of documents finds."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from kernelm_cli.results import short
from kernelm_cli.session import Output, asking, connection, print_json, print_piece, stdout
from kernelm_contracts.retriever import (
    AnswerFrame,
    AnswerRequest,
    RecommendReply,
    RecommendRequest,
    Retriever,
    SearchReply,
    SearchRequest,
    Source,
)  # fmt: skip
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import ClientFault

T = TypeVar("T")
TIMEOUT_S, FRAME_S = 60.0, 300.0  # for an answer; for the next piece of one
Name = Annotated[str, Parameter(name="NAME")]
Words = Annotated[str, Parameter(name="TEXT", allow_leading_hyphen=True)]


def search(name: Name, text: Words, /, *, top: int = 5, output: Output = Output()) -> int:
    """Find the passages nearest to TEXT in the index that is deployed as NAME.

    Parameters
    ----------
    top
        The nearest so many.
    """
    request = SearchRequest(text, name, top)
    reply: SearchReply = asyncio.run(_asked(output, name, lambda bus: bus.call(Retriever.search, request, model=name,
                                                                               timeout_s=TIMEOUT_S)))  # fmt: skip
    _show(reply, output)
    return 0


def recommend(name: Name, *documents: Annotated[str, Parameter(name="DOCUMENT")], like: str = "", top: int = 5,
              output: Output = Output()) -> int:  # fmt: skip
    """Recommend documents like some of the index that is deployed as NAME, or like a text.

    Parameters
    ----------
    documents
        Ids, as `kernelm search` prints them.
    like
        A text that they shall be like.
    top
        The nearest so many.
    """
    request = RecommendRequest(documents, like, name, top)
    reply: RecommendReply = asyncio.run(_asked(output, name, lambda bus: bus.call(Retriever.recommend, request, model=name,
                                                                                  timeout_s=TIMEOUT_S)))  # fmt: skip
    _show(reply, output)
    return 0


def ask(name: Name, text: Words, /, *, top: int = 4, max_tokens: int = 0, output: Output = Output()) -> int:
    """Have a question answered from the documents of the index that is deployed as NAME, with sources.

    Parameters
    ----------
    top
        The answer may be made of so many passages.
    max_tokens
        Of the answer; 0 for the server's own limit.
    """
    request = AnswerRequest(text, name, top, max_tokens)
    frames: list[AnswerFrame] = asyncio.run(_asked(output, name, lambda bus: _answer(bus, request, not output.json)))
    sources, last = frames[0].sources, frames[-1]
    if output.json:
        print_json({"answer": "".join(f.text for f in frames), "sources": sources, "end": last})
        return 0
    console = stdout()
    if last.finish_reason == "no_source":
        console.print("no passage of the documents is near enough to the question to answer it")
    else:
        console.print("\n")
        _list(sources, console)
    console.print(_giver(last))
    return 0


async def _answer(bus: Bus, request: AnswerRequest, shown: bool) -> list[AnswerFrame]:
    """All frames; the text is printed as it comes."""
    frames = []
    async with aclosing(bus.stream(Retriever.answer, request, model=request.model, idle_s=FRAME_S)) as pieces:
        async for frame in pieces:
            frames.append(frame)
            if shown:
                print_piece(frame.text)
    return frames


async def _asked(output: Output, name: str, ask: Callable[[Bus], Awaitable[T]]) -> T:
    async with connection(output.folder) as bus:
        try:
            with asking(name):
                return await ask(bus)
        except ClientFault as fault:
            if fault.code != "unsupported_method" or "generator" in fault.remedy:
                raise
            raise ClientFault(fault.code, f"{name!r} is no index of documents", "deploy/runs/questions.toml makes one") from None


def _show(reply: SearchReply | RecommendReply, output: Output) -> None:
    if output.json:
        print_json(reply)
        return
    console = stdout()
    _list(reply.sources, console)
    console.print(_giver(reply))


def _list(sources: Sequence[Source], console: Console) -> None:
    """Number, title, score and id of each, then what it says."""
    for number, source in enumerate(sources, 1):
        facts = f"  {source.score:.3f}  {source.document}"
        console.print(Text.assemble((f"[{number}] ", "bold"), (source.title, "bold green"), (facts, "dim")))
        console.print(Padding(Text(source.passage), (0, 0, 0, 4), expand=False))


def _giver(reply: Any) -> Text:
    return Text(f"{reply.model} generation {reply.generation}, index {short(reply.artifact)}, {reply.took_ms:.1f} ms", "dim")
