"""What an instance does all its life, and how it ends. These checks come last: they end the instance."""

import itertools
import json
import re
import signal
import time

import msgspec

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.results import Failed, Skipped
from kernelm.testing.harness import within
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.events import digest
from kernelm_sdk.serving import ERROR, ERROR_CODE

checks = Checks()
LEASE_S = 5.0
SECRETS = (
    ("the seed of a key", re.compile(r"\bS[UAO][A-Z2-7]{56}\b")),
    ("a JWT", re.compile(r"\beyJ[\w-]{20,}\.eyJ[\w-]{20,}\.[\w-]{20,}")),
    ("a stack trace", re.compile(r"Traceback \(most recent call last\)|\bFile \\?\"[^\"]+\", line \d+|"
                                 r"\n\s+at .+\(.+:\d+:\d+\)|goroutine \d+ \[")),
)  # fmt: skip


@checks.add(
    "faults.well-formed",
    "every fault it ever answered has both headers and a body as kernel/PROTOCOL.md says",
    "headers Nats-Service-Error (one line) and Nats-Service-Error-Code (an HTTP status), the fault as the body",
)
async def well_formed(case: Case) -> None:
    for exchange in case.main.wire.seen:
        for reply in (r for r in exchange.replies if r.is_fault or ERROR in r.headers):
            code, line = reply.headers.get(ERROR_CODE, ""), reply.headers.get(ERROR)
            if not re.fullmatch(r"[45]\d\d", code):
                raise Failed(f"{ERROR_CODE} is {code!r}, and no HTTP status of an error", exchange.text)
            if not line or "\n" in line:
                raise Failed(f"{ERROR} is {line!r}, and not one line", exchange.text)
            try:
                fault = msgspec.json.decode(reply.body, type=FaultBody)
            except msgspec.DecodeError as error:
                raise Failed(f"the body is no fault: {error}", exchange.text) from None
            if not (fault.code and fault.message):
                raise Failed("a fault without code or message", exchange.text)


@checks.add(
    "faults.discreet",
    "no answer, report or event holds a key, a token or a stack trace",
    "what went wrong inside goes to the log; the caller gets a line that says what and a remedy",
)
async def discreet(case: Case) -> None:
    texts = [(e.text, r.body.decode("utf-8", "replace") + json.dumps(r.headers)) for e in case.main.wire.seen for r in e.replies]
    sent = [m for m in case.main.tap.messages if ".kernel.v1." not in m[0]]
    texts += [
        (f"-> {subject}  {body.decode('utf-8', 'replace')[:600]}", body.decode("utf-8", "replace")) for subject, body, _, _ in sent
    ]
    for shown, text in texts:
        for what, pattern in SECRETS:
            if pattern.search(text.replace("\\n", "\n")):
                raise Failed(f"it sent {what}", shown)


@checks.add(
    "subjects.declared",
    "publishes and subscribes only where its manifest and its role let it",
    "list what it calls under `calls` in the manifest, or don't call it",
)
async def declared(case: Case) -> None:
    if denied := case.stand.denials(case.main):
        raise Failed(f"the broker denied it {len(denied)} times", denied[0][:400])


@checks.add(
    "events.declared",
    "publishes only events of its contracts, in an envelope as kernel/PROTOCOL.md says",
    "declare the event with the contract; number them without gaps, and give the digest of the body",
)
async def events(case: Case) -> None:
    known = {kind for shapes in case.subject.schemas.values() for kind in shapes.schema.get("events", {})}
    numbers = dict[str, int]()
    for subject, body, headers, _ in case.main.tap.of("evt."):
        kind, text = ".".join(subject.split(".")[1:3]), f"-> {subject}  {headers}\n   {body[:300].decode('utf-8', 'replace')}"
        if kind not in known:
            raise Failed(f"event {kind!r} is not declared by {', '.join(case.subject.schemas)}", text)
        for header, wanted in (("ce-type", kind), ("ce-specversion", "1.0"), ("ce-digest", digest(body)),
                               ("ce-id", headers.get("Nats-Msg-Id"))):  # fmt: skip
            if headers.get(header) != wanted:
                raise Failed(f"{header} is {headers.get(header)!r}, and should be {wanted!r}", text)
        boot, number = headers.get("ce-boot", ""), int(headers.get("ce-sequence", "0"))
        if number not in (numbers.get(boot, 0), numbers.get(boot, 0) + 1):  # once more is a repeated publish
            raise Failed(f"ce-sequence goes from {numbers.get(boot, 0)} to {number}", text)
        numbers[boot] = number
        for shapes in case.subject.schemas.values():
            schema = shapes.schema.get("events", {}).get(kind)
            if schema and (problem := shapes.problem(schema, json.loads(body))):
                raise Failed(f"{kind} does not fit its schema: {problem}", text)


@checks.add("life.lease", "renews its lease every third of its time to live", "kernel/PROTOCOL.md, 'The life of an instance', 5")
async def lease(case: Case) -> None:
    subject = f"$KV.leases.{case.main.name}"
    try:
        await within(lambda: len(case.main.tap.of(subject)) > 1, 2 * LEASE_S)
    except AssertionError:
        raise Failed(f"{len(case.main.tap.of(subject))} renewals within {2 * LEASE_S:g} s") from None
    renewals = case.main.tap.of(subject)
    if (ttl := renewals[0][2].get("Nats-TTL")) != f"{LEASE_S:g}":
        raise Failed(f"the header Nats-TTL is {ttl!r}, and lease_ttl_s is {LEASE_S:g}", f"-> {subject}  {renewals[0][1].decode()}")
    gap = max(b[3] - a[3] for a, b in itertools.pairwise(renewals))
    if gap >= LEASE_S:
        raise Failed(f"{gap:.1f} s between two renewals of a lease of {LEASE_S:g} s")


def calls_for(case: Case, count: int) -> list[tuple[str, object]]:
    """Calls to the pool of the main instance."""
    found: list[tuple[str, object]] = []
    for contract, method, shapes, about in case.methods("unary"):
        request = case.sample(contract, method) or shapes.valid(about["request"], case.chance(f"drain {contract}.{method}"))
        found += [(case.main.wire.subject(contract, method, pool=True), request)] * count
    contract = next(iter(case.subject.schemas))
    return found or [(case.main.wire.subject(contract, "no-such-method", pool=True), {})] * count


@checks.add(
    "life.drain",
    "drains within its deadline: leaves the pool, answers what was delivered, stays reachable itself",
    "unsubscribe from impl.<pool>.>, flush, answer what has arrived, then answer `drain`",
)
async def drain(case: Case) -> None:
    wire, began = case.main.wire, time.monotonic()
    asked = [*calls_for(case, 20), (wire.subject("plugin/1", "drain"), {"deadline_s": 10.0})]
    *calls, drained = await wire.ask_all(asked, timeout_s=40.0)
    took = time.monotonic() - began
    if not drained.answered:
        raise Failed("`drain` is not answered", drained.text)
    if took > 15.0:
        raise Failed(f"`drain` with a deadline of 10 s took {took:.1f} s", drained.text)
    if lost := [c for c in calls if not c.replies]:
        raise Failed(f"{len(lost)} of {len(calls)} calls that were under way are not answered", lost[0].text)
    after = await wire.ask(*calls_for(case, 1)[0], timeout_s=2.0)
    if after.problem != "no responders":
        raise Failed("it takes calls of its pool after `drain`", after.text)
    probed = await wire.ask(wire.subject("plugin/1", "probe"), {})
    if not probed.answered:
        raise Failed("it does not answer `probe` after `drain`", probed.text)


@checks.add("life.stop", "answers `stop`, and exits with 0", "answer, drain, close, exit(0)")
async def stop(case: Case) -> None:
    exchange = await case.main.wire.ask(case.main.wire.subject("plugin/1", "stop"), {})
    if not exchange.answered:
        raise Failed("`stop` is not answered", exchange.text)
    code = await case.main.ended(case.subject.manifest.drain_s + 10)
    if code is None:
        raise Failed(f"it runs on {case.subject.manifest.drain_s + 10:g} s after `stop`", case.main.last_lines())
    if code != 0:
        raise Failed(f"it ended with code {code} after `stop`", case.main.last_lines())


@checks.add("life.sigterm", "ends with 0 on SIGTERM, within its `drain_s`", "SIGTERM means stop")
async def sigterm(case: Case) -> None:
    spare = case.spares["stop"]
    await spare.ready()
    spare.signal(signal.SIGTERM)
    code = await spare.ended(case.subject.manifest.drain_s + 10)
    if code is None:
        raise Failed(f"it runs on {case.subject.manifest.drain_s + 10:g} s after SIGTERM", spare.last_lines())
    if code != 0:
        raise Failed(f"it ended with code {code} after SIGTERM", spare.last_lines())


@checks.add(
    "samples.good",
    "the requests in conformance.toml name methods of its contracts and fit their schemas",
    "correct conformance.toml",
)
async def samples(case: Case) -> None:
    if not case.subject.samples.requests:
        raise Skipped("no conformance.toml with requests")
    methods = {f"{c}.{m}": (shapes, about) for c, m, shapes, about in case.methods("unary", "streamed", "job")}
    for name, request in case.requests.items():
        if name not in methods:
            raise Failed(f"[requests] {name!r} is none of {', '.join(methods)}")
        shapes, about = methods[name]
        if problem := shapes.problem(about["request"], request):
            raise Failed(f"[requests] {name!r}: {problem}", msgspec.json.encode(request).decode())
