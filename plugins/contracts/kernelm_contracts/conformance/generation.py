"""`server/1.generate`: text comes as it is made, is counted, ends where it shall, and costs nothing once its caller is gone.

Checks of servers that have the method; server.py adds them to those of every server. What is asked is the sample that the author
gives for `server/1.generate` in conformance.toml; text that it must be answered with at temperature 0 stands there under [golden].
"""

import asyncio
import json
import secrets
import time
from typing import Any

import msgspec

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.results import Failed, Skipped
from kernelm.testing.conformance.wire import Exchange
from kernelm.testing.harness import within
from kernelm_contracts.server import GenerateFrame, GenerateRequest, Server, ServerInfo, Usage

checks = Checks()
CONTRACT, GENERATE, INFO = "server/1", "generate", "info"
SAMPLE = {"prompt": "Once upon a time there was", "max_tokens": 24, "temperature": 0}
STREAM_S = 90.0  # for a whole answer
CANCELLED, VANISHED = 2, 6  # callers that go away at a time
TOO_QUICK_S = 0.3  # an answer that takes less is over before it can be cancelled


class Answer(msgspec.Struct):
    """An answer in full."""

    text: str
    pieces: list[str]  # texts of the frames
    last: GenerateFrame
    usage: Usage
    exchange: Exchange


def sample(case: Case) -> dict[str, Any]:
    """The author's request at temperature 0, or one that most models have something to say to."""
    return {**(case.sample(CONTRACT, GENERATE) or SAMPLE), "temperature": 0}


async def ask(case: Case, **changes: Any) -> Exchange:
    """One request; Skipped where the plugin does not have the method."""
    exchange = await case.call(CONTRACT, GENERATE, {**sample(case), **changes}, timeout_s=STREAM_S)
    if exchange.fault is not None and exchange.fault.code == "unsupported_method":
        raise Skipped(f"it has no `{GENERATE}`")
    return exchange


async def answer(case: Case, **changes: Any) -> Answer:
    """The answer; Failed if it is none, or not framed as the contract says."""
    exchange = await ask(case, **changes)
    if exchange.problem or not exchange.answered:
        raise Failed(f"`{GENERATE}` is not answered: {exchange.problem or 'a fault'}", exchange.text)
    *frames, end = exchange.replies
    if end.headers.get("Kernelm-Last") != str(len(frames)):
        raise Failed(f"{len(frames)} frames came, and the end says Kernelm-Last: {end.headers.get('Kernelm-Last')}", exchange.text)
    try:
        decoded = [msgspec.json.decode(frame.body, type=GenerateFrame) for frame in frames]
    except msgspec.DecodeError as error:
        raise Failed(f"a frame is no GenerateFrame: {error}", exchange.text) from None
    if not decoded or decoded[-1].finish_reason == "" or (usage := decoded[-1].usage) is None:
        raise Failed("the last frame has no `finish_reason` or no `usage`", exchange.text)
    if any(frame.finish_reason or frame.usage for frame in decoded[:-1]):
        raise Failed("a frame before the last has a `finish_reason` or `usage`", exchange.text)
    pieces = [frame.text for frame in decoded]
    return Answer("".join(pieces), pieces, decoded[-1], usage, exchange)


@checks.add(
    "server.stream",
    "sends the text as it is made, and ends with one frame that says how it ended and what it cost",
    "a frame for each piece of text; then one with `finish_reason`, `usage` and the model's identity",
)
async def stream(case: Case) -> None:
    found = await answer(case)
    texts = [piece for piece in found.pieces if piece]
    if found.usage.completion_tokens >= 8 and len(texts) < 2:
        raise Failed(f"{found.usage.completion_tokens} tokens came in {len(texts)} pieces: that is no stream", found.exchange.text)
    if not 0 <= found.last.first_ms <= found.last.took_ms:
        raise Failed(f"`first_ms` is {found.last.first_ms}, and `took_ms` {found.last.took_ms}", found.exchange.text)


@checks.add(
    "server.counts",
    "counts the tokens of prompt and answer, and keeps to `max_tokens`",
    '`finish_reason` "length" at exactly `max_tokens` tokens, "stop" before; `prompt_tokens` is all that was read',
)
async def counts(case: Case) -> None:
    request = sample(case)
    most = request.get("max_tokens") or 24
    for limit in {1, most}:
        found = await answer(case, max_tokens=limit)
        made = found.usage.completion_tokens
        if not 0 < made <= limit or (found.last.finish_reason == "length") != (made == limit):
            raise Failed(f"{made} tokens of at most {limit}, and `finish_reason` {found.last.finish_reason!r}", found.exchange.text)
    short = await answer(case, prompt="one", messages=[], max_tokens=1)
    long = await answer(case, prompt="one two three four five six seven eight", messages=[], max_tokens=1)
    if not 0 < short.usage.prompt_tokens < long.usage.prompt_tokens:
        raise Failed(f"a prompt of 8 words counts {long.usage.prompt_tokens} tokens, and one of 1 word {short.usage.prompt_tokens}",
                     long.exchange.text)  # fmt: skip


@checks.add(
    "server.greedy",
    "answers the same at temperature 0, and as its author says ([golden] in conformance.toml)",
    "take the likeliest token; what other calls are worked on beside it must not matter",
)
async def greedy(case: Case) -> None:
    first = await answer(case)
    again = await asyncio.gather(*(answer(case) for _ in range(3)))
    for other in again:
        if other.text != first.text:
            raise Failed(f"the same request at temperature 0: {first.text!r}, then {other.text!r}", other.exchange.text)
    golden = case.subject.samples.golden.get(f"{CONTRACT}.{GENERATE}", "")
    if not first.text.startswith(golden):
        raise Failed(f"it should begin with {golden!r}, and is {first.text!r}", first.exchange.text)


@checks.add(
    "server.stops",
    "ends before a stop string, also one that comes in pieces",
    'hold back what may be the beginning of a stop string; `finish_reason` is "stop"',
)
async def stops(case: Case) -> None:
    whole = (await answer(case)).text
    middle = len(whole) // 2
    stop = whole[middle : middle + 4]
    if len(stop.strip()) == 0 or whole.index(stop) == 0:
        raise Skipped(f"the sample is answered with {whole!r}, in which there is no place to stop")
    cut = await answer(case, stop=["no such text", stop])
    if cut.text != whole[: whole.index(stop)] or cut.last.finish_reason != "stop":
        raise Failed(f"with stop {stop!r}: {cut.text!r} and `finish_reason` {cut.last.finish_reason!r}; without it: {whole!r}",
                     cut.exchange.text)  # fmt: skip


@checks.add(
    "server.refusals",
    "refuses what has no meaning with a client's fault",
    "exactly one of `messages` and `prompt`; ranges are in kernelm_contracts/server.py",
)
async def refusals(case: Case) -> None:
    await ask(case, max_tokens=1)
    chat = [{"role": "user", "content": "Hello"}]
    for wrong in ({"prompt": "", "messages": []}, {"prompt": "Hello", "messages": chat}, {"max_tokens": -1}, {"temperature": -0.5},
                  {"top_p": 0.0}, {"top_p": 1.5}, {"stop": [""]}):  # fmt: skip
        exchange = await ask(case, **wrong)
        if exchange.fault is None or exchange.fault.whose != "client":
            raise Failed(f"{json.dumps(wrong)} is not refused with a client's fault", exchange.text)


@checks.add(
    "server.info",
    "says what its model is, and names the methods that it has",
    "`methods`: those that are answered, and no other",
)
async def info(case: Case) -> None:
    found = await about(case)
    model = case.settings["model"]
    for field, wanted in (("model", model["name"]), ("generation", model["generation"]), ("artifact", model["artifact"])):
        if getattr(found, field) != wanted:
            raise Failed(f"`{field}` is {getattr(found, field)!r}, and should be {wanted!r}")
    texts = {"input": ["text"]}
    for method, request in (("classify", texts), ("embed", texts), (GENERATE, {**sample(case), "max_tokens": 1})):
        exchange = await case.call(CONTRACT, method, request, timeout_s=STREAM_S)
        has = not (exchange.fault is not None and exchange.fault.code == "unsupported_method")
        if has != (method in found.methods):
            raise Failed(f"`methods` is {', '.join(found.methods)}, and `{method}` is {'answered' if has else 'unsupported'}",
                         exchange.text)  # fmt: skip


async def about(case: Case) -> ServerInfo:
    """What `info` says; Skipped where the plugin does not have it."""
    exchange = await case.call(CONTRACT, INFO, {})
    if exchange.fault is not None and exchange.fault.code == "unsupported_method":
        raise Skipped(f"it has no `{INFO}`")
    if not exchange.answered:
        raise Failed(f"`{INFO}` is not answered", exchange.text)
    return msgspec.json.decode(exchange.replies[-1].body, type=ServerInfo)


@checks.add(
    "server.gone",
    "stops its work when a caller cancels or vanishes",
    "leave the engine's loop when the generator is closed: what nobody reads must keep nobody waiting",
)
async def gone(case: Case) -> None:
    try:
        most = (await about(case)).max_tokens or sample(case).get("max_tokens", 24)
    except Skipped:
        most = sample(case).get("max_tokens", 24)
    long = {**sample(case), "max_tokens": most}
    whole = await answer(case, max_tokens=most)
    if whole.exchange.took_s < TOO_QUICK_S:
        raise Skipped(f"an answer of {most} tokens takes {whole.exchange.took_s:.2f} s: too quick to be cancelled")
    before = await _in_flight(case)
    await asyncio.gather(*(_cancel(case, long) for _ in range(CANCELLED)))
    for _ in range(VANISHED):
        await _vanish(case, long)
    began = time.monotonic()
    await answer(case, max_tokens=1)
    waited, patience = time.monotonic() - began, max(2 * whole.exchange.took_s, 1.0)
    if waited > patience:
        raise Failed(f"after {CANCELLED + VANISHED} callers had gone away a call for 1 token took {waited:.1f} s, and one whole "
                     f"answer takes {whole.exchange.took_s:.1f} s: it works on for nobody")  # fmt: skip

    async def quiet() -> bool:
        return await _in_flight(case) <= before

    try:
        await within(quiet, patience)
    except AssertionError:
        raise Failed(f"`probe` still counts {await _in_flight(case)} calls in flight after their callers had gone away") from None


async def _cancel(case: Case, request: dict[str, Any]) -> None:
    """Ask, and cancel at the first frame."""
    wanted = msgspec.convert(request, GenerateRequest)
    async for _ in case.stand.bus().stream(Server.generate, wanted, instance=case.main.name, idle_s=STREAM_S):
        return


async def _vanish(case: Case, request: dict[str, Any]) -> None:
    """Ask for an answer to where nobody listens."""
    bus, subject = case.stand.bus(), case.main.wire.subject(CONTRACT, GENERATE)
    nobody = f"_INBOX.{bus.user}.{secrets.token_hex(16)}.x"
    await bus._link.client.publish(subject, msgspec.json.encode(request), reply=nobody)


async def _in_flight(case: Case) -> int:
    exchange = await case.main.wire.ask(case.main.wire.subject("plugin/1", "probe"), {})
    if not exchange.answered:
        raise Failed("`probe` is not answered", exchange.text)
    return int(exchange.body["in_flight"])
