"""Jobs: what holds of every method that takes long. The checks play the job table."""

import asyncio
from functools import partial
from typing import Any

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.driver import Attempt
from kernelm.testing.conformance.results import Failed, Skipped
from kernelm.testing.harness import within
from kernelm_sdk.errors import ClientFault, KernelFault

checks = Checks()
FINISH_S = 90.0  # a sample job
QUIET_S = 0.4  # in which nothing more should come
PAGE = "kernel/PROTOCOL.md, 'Jobs'"
SAY_WHICH = "say which request ends with a result, under [requests] in conformance.toml at the root of the folder"


def job_methods(case: Case) -> list[tuple[str, str, Any, dict[str, Any]]]:
    """Job methods; Skipped where there are none."""
    found = case.methods("job")
    if not found:
        raise Skipped("no method is a job")
    return found


def request_of(case: Case, contract: str, method: str, shapes: Any, about: dict[str, Any]) -> Any:
    """The sample, or one that fits the types and most likely ends in a fault."""
    sample = case.sample(contract, method)
    return sample if sample is not None else shapes.valid(about["request"], case.chance(f"job {contract}.{method}"))


def _more_than_one(attempt: Attempt) -> bool:
    return attempt.finals > 1


async def finished(attempt: Attempt) -> None:
    """Wait for its final report; Failed if the dispatch was refused or none came."""
    sent = attempt.dispatched
    if sent is None or not sent.answered:
        raise Failed("the dispatch is not accepted with {}", attempt.text)
    try:
        await asyncio.wait_for(attempt.came.wait(), FINISH_S)
    except TimeoutError:
        raise Failed(f"no final report (result or fault) within {FINISH_S:g} s", attempt.text) from None


@checks.add("jobs.run", "accepts a job at once, and ends it with one report: a result that fits the schema, or a fault", PAGE)
async def run(case: Case) -> None:
    for contract, method, shapes, about in job_methods(case):
        attempt = await case.stand.driver.hand(case.main.wire, contract, method, request_of(case, contract, method, shapes, about))
        if case.sample(contract, method) is None and attempt.dispatched is not None and attempt.dispatched.fault is not None:
            continue  # made-up requests may be refused at once
        await finished(attempt)
        final = attempt.final
        assert final is not None
        if final.fault is not None and (case.sample(contract, method) is not None or final.fault.code == "internal"):
            raise Failed(f"{contract}.{method} ended in {final.fault.code}: {final.fault.message}", attempt.text,
                         SAY_WHICH if final.fault.whose == "client" else "")  # fmt: skip
        if final.result is not None and (problem := shapes.problem(about["reply"], final.result)):
            raise Failed(f"{contract}.{method}: the result does not fit its schema: {problem}", attempt.text)
        for _, report in attempt.reports:
            if report.progress is not None and not 0 <= report.progress.fraction <= 1:
                raise Failed(f"{contract}.{method}: a fraction of {report.progress.fraction} is not within 0 to 1", attempt.text)


@checks.add("jobs.caller", "takes jobs from `jobs` alone", "refuse any other caller (the last token of the subject)")
async def other_caller(case: Case) -> None:
    for contract, method, shapes, about in job_methods(case):
        attempt = case.stand.driver.attempt()
        _, body = case.stand.driver.message(
            case.main.wire, contract, method, attempt, request_of(case, contract, method, shapes, about)
        )
        exchange = await case.call(contract, method, body)
        if exchange.fault is None or exchange.fault.whose != "client":
            raise Failed(f"{contract}.{method}: a job of {case.stand.bus().user!r} is not refused", exchange.text)


@checks.add(
    "jobs.invalid",
    "refuses a job whose request does not fit, with a client's fault at once or as its report",
    "bad input does not get better by another attempt: a fault of the plugin would be retried for nothing",
)
async def invalid(case: Case) -> None:
    for contract, method, shapes, about in job_methods(case):
        chance = case.chance(f"wrong job {contract}.{method}")
        wrong = [(t, v) for t, v in shapes.wrong(about["request"], chance) if shapes.problem(about["request"], v)][:10]
        if shapes.resolve(about["request"]).get("additionalProperties") is False:
            wrong.append(("an unknown field", {**shapes.valid(about["request"], chance), "x-unknown": 1}))
        for text, value in wrong:
            attempt = await case.stand.driver.hand(case.main.wire, contract, method, value)
            sent = attempt.dispatched
            assert sent is not None
            if sent.answered:
                await finished(attempt)
            fault = sent.fault or (attempt.final.fault if attempt.final else None)
            if fault is None or fault.whose != "client":
                raise Failed(f"{contract}.{method}: {text}: not refused with a client's fault", attempt.text)


@checks.add(
    "jobs.duplicate",
    "does a job once that is handed over twice, also when the copy comes late",
    "keep the epochs of the jobs that are at work or over; the same job and epoch is answered {} and changes nothing",
)
async def duplicate(case: Case) -> None:
    driver = case.stand.driver
    for contract, method, shapes, about in job_methods(case):
        attempt = driver.attempt()
        message = driver.message(case.main.wire, contract, method, attempt, request_of(case, contract, method, shapes, about))
        wire = type(case.main.wire)(driver.bus, case.main.name, case.main.pool)
        sent = await wire.ask_all([message, message])
        attempt.dispatched = sent[0]
        if any(e.fault is not None for e in sent) and case.sample(contract, method) is None:
            continue
        if not all(e.answered for e in sent):
            raise Failed("the same job and epoch again is not answered with {}", "\n".join(e.text for e in sent))
        await finished(attempt)
        late = await wire.ask(*message)
        if not late.answered:
            raise Failed("a copy that comes after the end is not answered with {}", late.text)
        await asyncio.sleep(QUIET_S)
        if attempt.finals != 1:
            raise Failed(f"a job that was handed over three times was reported {attempt.finals} times", attempt.text)


@checks.add("jobs.stale", "ignores an epoch that is older than the one it has had", "compare epochs before beginning")
async def stale(case: Case) -> None:
    driver = case.stand.driver
    for contract, method, shapes, about in job_methods(case):
        request = request_of(case, contract, method, shapes, about)
        newer = await driver.hand(case.main.wire, contract, method, request, driver.attempt(epoch=3))
        if newer.dispatched is not None and newer.dispatched.fault is not None and case.sample(contract, method) is None:
            continue
        await finished(newer)
        older = await driver.hand(case.main.wire, contract, method, request, driver.attempt(newer.job, epoch=2))
        await asyncio.sleep(QUIET_S)
        if older.reports:
            raise Failed("epoch 2 was worked on after epoch 3 of the same job", older.text)


@checks.add(
    "jobs.busy",
    "refuses more jobs than its manifest's `max_jobs` at a time with the retriable fault `busy`",
    "count the jobs whose last report is not answered yet",
)
async def busy(case: Case) -> None:
    driver, most = case.stand.driver, case.subject.manifest.max_jobs
    contract, method, shapes, about = job_methods(case)[0]
    request = request_of(case, contract, method, shapes, about)
    held = [driver.attempt() for _ in range(most)]
    try:
        for attempt in held:
            attempt.released.clear()
            await driver.hand(case.main.wire, contract, method, request, attempt)
            if attempt.dispatched is not None and attempt.dispatched.fault is not None:
                if case.sample(contract, method) is None:
                    raise Skipped("no sample of a job that is accepted: give one in conformance.toml")
                raise Failed(f"job {len(held)} of {most} is refused", attempt.text)
        one_more = await driver.hand(case.main.wire, contract, method, request)
        fault = one_more.dispatched.fault if one_more.dispatched else None
        if fault is None or fault.code != "busy" or not fault.retriable:
            raise Failed(f"job {most + 1} is not refused with the retriable fault `busy`", one_more.text)
    finally:
        for attempt in held:
            attempt.released.set()
    for attempt in held:
        await finished(attempt)


@checks.add(
    "jobs.repeat",
    "repeats a report that was not answered, or answered with a retriable fault of the system",
    "the job table may be starting again: a result that it never got is work done for nothing",
)
async def repeat(case: Case) -> None:
    driver = case.stand.driver
    for contract, method, shapes, about in job_methods(case):
        attempt = driver.attempt()

        def once(report: Any, attempt: Attempt = attempt) -> KernelFault | None:
            again = attempt.finals > 1 or (report.result is None and report.fault is None)
            return None if again else KernelFault("not_ready", "the job table is starting", retriable=True)

        attempt.answer = once
        await driver.hand(case.main.wire, contract, method, request_of(case, contract, method, shapes, about), attempt)
        if attempt.dispatched is not None and attempt.dispatched.fault is not None and case.sample(contract, method) is None:
            continue
        await finished(attempt)
        try:
            await within(partial(_more_than_one, attempt), 20.0)
        except AssertionError:
            raise Failed(
                "the final report was answered with a retriable fault, and not repeated within 20 s", attempt.text
            ) from None


@checks.add(
    "jobs.fenced",
    "gives a job up when a report is answered with `stale_epoch`: somebody else has it",
    "stop, store nothing, publish nothing, report nothing more",
)
async def fenced(case: Case) -> None:
    driver = case.stand.driver
    for contract, method, shapes, about in job_methods(case):
        attempt = driver.attempt()
        attempt.answer = lambda _: ClientFault("stale_epoch", "epoch 2 has it now")
        await driver.hand(case.main.wire, contract, method, request_of(case, contract, method, shapes, about), attempt)
        if attempt.dispatched is not None and attempt.dispatched.fault is not None and case.sample(contract, method) is None:
            continue
        await within(partial(getattr, attempt, "reports"), FINISH_S, "a report")
        await asyncio.sleep(QUIET_S)
        if len(attempt.reports) > 2:  # one more may have been on its way
            raise Failed(f"{len(attempt.reports)} reports after the first was answered with `stale_epoch`", attempt.text)


@checks.add(
    "jobs.cancel",
    "stops a cancelled job, and reports no result of it after the answer",
    "let the work look at the cancellation between its steps",
)
async def cancel(case: Case) -> None:
    driver = case.stand.driver
    for contract, method, shapes, about in job_methods(case):
        attempt = driver.attempt()
        subject, body = driver.message(case.main.wire, contract, method, attempt, request_of(case, contract, method, shapes, about))
        wire = type(case.main.wire)(driver.bus, case.main.name, case.main.pool)
        order = (wire.subject("plugin/1", "cancel"), {"job": attempt.job, "epoch": 1, "reason": "nobody wants it any more"})
        sent, cancelled = await wire.ask_all([(subject, body), order], timeout_s=40.0)
        attempt.dispatched = sent
        if not cancelled.answered:
            raise Failed("`cancel` is not answered", cancelled.text)
        at = cancelled.replies[-1].at
        await asyncio.sleep(QUIET_S)
        late = [r for when, r in attempt.reports if when > at + 0.1 and (r.result is not None or r.fault is not None)]
        if late:
            raise Failed("it reported on the job after the cancellation was answered", attempt.text)
        probed = await case.main.wire.ask(case.main.wire.subject("plugin/1", "probe"), {})
        if probed.answered and f"{attempt.job}/1" in probed.body.get("jobs", ()):
            raise Failed("the cancelled job is still at work after `cancel` was answered", probed.text)


@checks.add("jobs.poison", "outlives hostile dispatches", "validate the dispatch before anything else")
async def poison(case: Case) -> None:
    driver = case.stand.driver
    for contract, method, _, _ in job_methods(case):
        wire = type(case.main.wire)(driver.bus, case.main.name, case.main.pool)
        subject = wire.subject(contract, method)
        bodies = [b"", b"[]", b"{}", b'{"job": 1}', b'{"job": "x", "epoch": "1", "attempt": 1, "request": {}}']
        for exchange in await wire.ask_all([(subject, body) for body in bodies]):
            if exchange.problem or exchange.fault is None or exchange.fault.whose != "client":
                raise Failed(f"not refused with a client's fault: {exchange.problem}", exchange.text)
