"""Handshake, calls and faults: what holds of every contract."""

import json
import time
from typing import Any

import msgspec

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.results import Failed, Skipped
from kernelm.testing.conformance.wire import Exchange
from kernelm_sdk.system import Probe

checks = Checks()
VALID, WRONG, TOGETHER = 12, 12, 32
CONTRACT_PAGE = "kernel/PROTOCOL.md, 'Calls'"


def fault_problem(exchange: Exchange) -> str:
    """Why what came back is neither a result nor a well-formed fault; "" if it is one."""
    if exchange.problem:
        return exchange.problem
    if len(exchange.replies) > 1 and not any("Kernelm-Last" in r.headers for r in exchange.replies):
        return f"{len(exchange.replies)} answers to one call"
    if exchange.answered:
        return ""
    if exchange.fault is None:
        return "the body of the fault is no {whose, code, message, remedy, retriable, details}"
    return ""


@checks.add(
    "handshake.contracts",
    "hello names the manifest's contracts with their schema hashes",
    "send `schema_hash` of the contract's schema file; a plugin built against another version is to be built anew",
)
async def hello_contracts(case: Case) -> None:
    hellos = case.main.tap.of("impl.kernel.kernel.v1.hello.")
    if not hellos:
        raise Failed("no hello was seen")
    body = json.loads(hellos[0][1])
    offered = {c.get("id"): c.get("schema_hash") for c in body.get("contracts", [])}
    text = f"-> {hellos[0][0]}  {hellos[0][1].decode()[:600]}"
    for contract, shapes in case.subject.schemas.items():
        wanted = shapes.schema.get("schema_hash")
        if contract not in offered:
            raise Failed(f"hello does not offer {contract}, which the manifest names", text)
        if wanted and offered[contract] != wanted:
            raise Failed(f"hello says {contract} has the schema {offered[contract]}, and it is {wanted}", text)
    for key, value in (
        ("plugin", case.subject.manifest.name),
        ("instance", case.main.name),
        ("version", case.subject.manifest.version),
    ):
        if body.get(key) != value:
            raise Failed(f"hello's `{key}` is {body.get(key)!r}, and should be {value!r}", text)


@checks.add("handshake.token", "deletes the file with its join token once it is read", "unlink KERNELM_TOKEN_FILE")
async def token_deleted(case: Case) -> None:
    if case.place.keeps_token:
        raise Skipped("its token is mounted read-only, and the node deletes it")
    if case.main.token.exists():
        raise Failed(f"{case.main.token.name} (KERNELM_TOKEN_FILE) is still there when the instance is ready")


@checks.add(
    "handshake.refused",
    "ends with a failure when its hello is refused, and does not insist",
    "on a fault of `hello` that is not retriable: print it, exit with 1",
)
async def refused(case: Case) -> None:
    instance = case.spares["refused"]
    code = await instance.ended(60.0)
    asked = case.stand.refused[instance.name]
    if code is None:
        raise Failed(f"it runs on after its hello was refused with version_mismatch (asked {asked} times)", instance.last_lines())
    if code == 0:
        raise Failed("it exits with 0 after its hello was refused: the node would take that for success")
    if asked != 1:
        raise Failed(f"it said hello {asked} times, and was refused for good the first time")


@checks.add("verbs.probe", "answers `probe` as plugin/1 says, and counts its calls", "kernel/PROTOCOL.md, 'Verbs'")
async def probe(case: Case) -> None:
    async def ask() -> tuple[Probe, str]:
        exchange = await case.main.wire.ask(case.main.wire.subject("plugin/1", "probe"), {})
        if not exchange.answered:
            raise Failed("no answer to `probe`", exchange.text)
        try:
            return msgspec.json.decode(exchange.replies[-1].body, type=Probe), exchange.text
        except msgspec.DecodeError as error:
            raise Failed(f"the answer is no Probe: {error}", exchange.text) from None

    before, text = await ask()
    if before.instance != case.main.name:
        raise Failed(f"`instance` is {before.instance!r}, and not {case.main.name!r}", text)
    contract = next(iter(case.subject.schemas))
    for _ in range(3):  # a client's fault is a call, and no failure
        await case.call(contract, "no-such-method", {})
    after, text = await ask()
    if after.answered - before.answered != 3 or after.failed != before.failed:
        raise Failed(f"after 3 calls with a client's fault `answered` grew by {after.answered - before.answered} (3) and `failed` "
                     f"by {after.failed - before.failed} (0)", text)  # fmt: skip
    if after.latency and sum(after.latency) != after.answered:
        raise Failed(f"the histogram holds {sum(after.latency)} calls, and `answered` is {after.answered}", text)


@checks.add("calls.unknown-method", "refuses a method that its contract does not have with `unsupported_method`", CONTRACT_PAGE)
async def unknown_method(case: Case) -> None:
    for contract in case.subject.schemas:
        exchange = await case.call(contract, "no-such-method", {})
        if exchange.fault is None or (exchange.fault.whose, exchange.fault.code) != ("client", "unsupported_method"):
            raise Failed("an unknown method is not refused with the client's fault `unsupported_method`", exchange.text)


@checks.add(
    "calls.valid",
    "answers valid requests with a valid reply, or refuses them with a well-formed fault that is no bug",
    "every request that fits the schema needs an answer: refuse what has no meaning with a client's fault",
)
async def valid_requests(case: Case) -> None:
    for contract, method, shapes, about in case.methods("unary", "streamed"):
        chance = case.chance(f"valid {contract}.{method}")
        wanted = [case.sample(contract, method)] if case.sample(contract, method) is not None else []
        for number, request in enumerate(wanted + [shapes.valid(about["request"], chance, full=n == 0) for n in range(VALID)]):
            exchange = await case.call(contract, method, request)
            if number < len(wanted) and exchange.fault is not None:
                raise Failed(f"{contract}.{method}: the sample request is refused", exchange.text)
            _accept(exchange, f"{contract}.{method}", shapes, about)


def _accept(exchange: Exchange, what: str, shapes: Any, about: dict[str, Any]) -> None:
    if why := fault_problem(exchange):
        raise Failed(f"{what}: a valid request got {why}", exchange.text)
    if (fault := exchange.fault) is not None:
        if fault.code == "internal":
            raise Failed(f"{what}: a valid request ran into a bug of the plugin: {fault.message}", exchange.text)
        return
    for reply in exchange.replies:
        if "Kernelm-Last" in reply.headers:
            continue
        try:
            problem = shapes.problem(about["reply"], msgspec.json.decode(reply.body))
        except ValueError as error:
            problem = str(error)
        if problem:
            raise Failed(f"{what}: the reply does not fit its schema: {problem}", exchange.text)


@checks.add(
    "calls.invalid",
    "refuses what does not fit the request's schema with a client's fault",
    "validate each request against its type before anything else; the caller's mistake is no failure of the plugin",
)
async def invalid_requests(case: Case) -> None:
    for contract, method, shapes, about in case.methods("unary", "streamed"):
        chance = case.chance(f"wrong {contract}.{method}")
        wrong = [(text, value) for text, value in shapes.wrong(about["request"], chance) if shapes.problem(about["request"], value)]
        bodies = [("no JSON", b"\x00\xff{"), ("an empty body", b""), ("half a body", b'{"a": ['), *wrong]
        for text, body in bodies[: WRONG + 8]:
            exchange = await case.call(contract, method, body)
            if exchange.answered:
                raise Failed(f"{contract}.{method}: {text}: it was answered", exchange.text)
            if exchange.fault is None or exchange.fault.whose != "client":
                raise Failed(f"{contract}.{method}: {text}: {fault_problem(exchange) or 'the fault is not of the client'}",
                             exchange.text)  # fmt: skip


@checks.add("calls.unknown-fields", "ignores fields that it does not know", "a newer client sends them: skip, don't refuse")
async def unknown_fields(case: Case) -> None:
    for contract, method, shapes, about in case.methods("unary", "streamed"):
        if shapes.resolve(about["request"]).get("additionalProperties") is False:
            continue
        request = case.sample(contract, method) or shapes.valid(about["request"], case.chance(f"fields {contract}.{method}"))
        plain = await case.call(contract, method, request)
        more = await case.call(contract, method, {**request, "x-from-a-newer-client": {"a": [1]}})
        one, other = (e.fault.code if e.fault else e.problem for e in (plain, more))
        if one != other:
            raise Failed(f"{contract}.{method}: {other or 'answered'} with an unknown field, and {one or 'answered'} without",
                         f"{plain.text}\n{more.text}")  # fmt: skip


@checks.add(
    "calls.together", "answers each of many calls at a time exactly once", "one call must not wait for, or answer for, another"
)
async def together(case: Case) -> None:
    requests = []
    for contract, method, shapes, about in case.methods("unary"):
        chance = case.chance(f"together {contract}.{method}")
        request = case.sample(contract, method) or shapes.valid(about["request"], chance)
        requests += [(case.main.wire.subject(contract, method), request)] * TOGETHER
    if not requests:
        raise Skipped("no unary method")
    exchanges = await case.main.wire.ask_all(requests, timeout_s=40.0, linger_s=0.2)
    for exchange in exchanges:
        if len(exchange.replies) != 1:
            raise Failed(f"{len(exchange.replies)} answers to one of {len(exchanges)} calls at a time", exchange.text)


@checks.add(
    "calls.pool",
    "answers what is sent to its pool, in the pool's queue group",
    "subscribe to impl.<pool>.> in the queue group <pool>",
)
async def of_pool(case: Case) -> None:
    contract = next(iter(case.subject.schemas))
    exchange = await case.main.wire.ask(case.main.wire.subject(contract, "no-such-method", pool=True), {}, timeout_s=5.0)
    if exchange.problem:
        raise Failed("a call to the pool is not answered", exchange.text)


POISON = (
    ("10,000 brackets", b"[" * 10_000), ("an object 5,000 deep", b'{"a":' * 5_000 + b"1" + b"}" * 5_000),
    ("a number of 5,000 digits", b'{"a":' + b"9" * 5_000 + b"}"), ("not a number", b'{"a": NaN, "b": 1e999}'),
    ("a lone surrogate", b'{"a": "\\ud800"}'), ("a NUL", b'{"a": "\\u0000"}'),
    ("500,000 characters", b'{"a": "' + b"x" * 500_000 + b'"}'),
    ("20,000 members", b"{" + b",".join(b'"k%d":1' % n for n in range(20_000)) + b"}"), ("half UTF-8", b'{"a": "\xe4\xb8"}'),
)  # fmt: skip


@checks.add("calls.poison", "outlives hostile bodies, and answers each of them", "bound the depth and the size of what is parsed")
async def poison(case: Case) -> None:
    subjects = [case.main.wire.subject(c, m) for c, m, *_ in case.methods("unary", "streamed")]
    subjects += [case.main.wire.subject("plugin/1", "probe"), case.main.wire.subject("plugin/1", "cancel")]
    for text, body in POISON:
        for exchange in await case.main.wire.ask_all([(subject, body) for subject in subjects]):
            if exchange.problem or (exchange.fault is not None and exchange.fault.code == "internal"):
                raise Failed(f"{text}: {exchange.problem or 'a bug of the plugin'}", exchange.text)
    if (code := case.main.code) is not None:
        raise Failed(f"it ended with code {code}", case.main.last_lines())
    alive = await case.main.wire.ask(case.main.wire.subject("plugin/1", "probe"), {})
    if not alive.answered:
        raise Failed("it does not answer `probe` after that", alive.text)


@checks.add("calls.headers", "refuses a deadline that is no number with a client's fault", "parse Kernelm-Deadline as Unix seconds")
async def hostile_headers(case: Case) -> None:
    for contract, method, shapes, about in case.methods("unary"):
        request = case.sample(contract, method) or shapes.valid(about["request"], case.chance(f"headers {contract}.{method}"))
        exchange = await case.call(contract, method, request, headers={"Kernelm-Deadline": "soon"})
        if exchange.fault is None or exchange.fault.whose != "client":
            raise Failed(f"{contract}.{method}: Kernelm-Deadline: soon is not refused with a client's fault", exchange.text)


@checks.add(
    "calls.late",
    "does not begin what nobody waits for: the header Kernelm-Deadline has passed",
    "answer with the kernel's fault `timeout` when Kernelm-Deadline (Unix seconds) is in the past",
)
async def late(case: Case) -> None:
    for contract, method, shapes, about in case.methods("unary"):
        request = case.sample(contract, method) or shapes.valid(about["request"], case.chance(f"late {contract}.{method}"))
        exchange = await case.call(contract, method, request, headers={"Kernelm-Deadline": f"{time.time() - 2:.3f}"})
        if exchange.answered:
            raise Failed(f"{contract}.{method}: it was answered long after the caller's deadline", exchange.text)
