"""What a good plugin outlives: a pause, a broker that restarts, a kill; and that it goes when it was given up.

Made on the instance that the other checks have used, before the checks of its end. They need a stand of their own.
"""

import asyncio
import signal

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.life import calls_for
from kernelm.testing.conformance.results import Failed
from kernelm.testing.harness import within
from kernelm_sdk.errors import Fault

checks = Checks()
BACK_S = 30.0


@checks.add(
    "chaos.pause",
    "answers what came while it was stopped for a second (SIGSTOP, SIGCONT)",
    "a second's silence is no reason to give anything up",
)
async def pause(case: Case) -> None:
    case.main.signal(signal.SIGSTOP)
    asking = asyncio.create_task(case.main.wire.ask_all(calls_for(case, 5), timeout_s=BACK_S))
    try:
        await asyncio.sleep(1.0)
    finally:
        case.main.signal(signal.SIGCONT)
    if lost := [e for e in await asking if not e.replies]:
        raise Failed(f"{len(lost)} calls that came during the pause are not answered", lost[0].text)


@checks.add("chaos.broker", "comes back by itself when the broker restarts", "reconnect without end, and subscribe again")
async def broker(case: Case) -> None:
    system, subject = case.stand.system, case.main.wire.subject("plugin/1", "probe")
    system.processes["broker"].terminate()
    await asyncio.to_thread(system.processes["broker"].wait, 10)
    system.start_broker()

    async def answers() -> bool:
        try:
            return (await case.main.wire.ask(subject, {}, timeout_s=1.0)).answered
        except (Fault, ConnectionError):
            return False

    try:
        await within(answers, BACK_S)
    except AssertionError:
        code = case.main.code
        raise Failed(f"it does not answer `probe` {BACK_S:g} s after the broker's restart, {_state(code)}",
                     case.main.last_lines()) from None  # fmt: skip
    exchanges = await case.main.wire.ask_all(calls_for(case, 1), timeout_s=10.0)
    if exchanges[0].problem:
        raise Failed("it does not take calls of its pool after the broker's restart", exchanges[0].text)


@checks.add(
    "chaos.kill",
    "starts again after a kill, with the scratch folder that the kill has left",
    "expect half-written files in KERNELM_SCRATCH",
)
async def kill(case: Case) -> None:
    victim = case.spares["killed"] = await case.start()
    await victim.ready()
    victim.signal(signal.SIGKILL)
    await victim.ended(10)
    again = await case.start(before=lambda instance: setattr(instance, "scratch", victim.scratch))
    case.spares["after the kill"] = again
    await again.ready()
    case.spares["again"] = case.spares.pop("after the kill")


@checks.add(
    "chaos.given-up",
    "ends itself when it was given up as lost while it was stopped: its key is revoked",
    "when the broker refuses the key for good: stop working, exit with a failure",
)
async def given_up(case: Case) -> None:
    zombie = case.spares["again"] if "again" in case.spares else await case.start()
    case.spares["again"] = zombie
    await zombie.ready()
    kernel = case.stand.system.kernel
    assert kernel is not None
    zombie.signal(signal.SIGSTOP)
    try:
        await within(lambda: kernel.registry.instances[zombie.name].state == "lost", 40.0, "the loss of a frozen instance")
    finally:
        zombie.signal(signal.SIGCONT)
    code = await zombie.ended(75.0)
    if not code:
        raise Failed(f"75 s after its key was revoked: {_state(code)}", zombie.last_lines())


def _state(code: int | None) -> str:
    return "it runs on" if code is None else f"it ended with code {code}"
