"""Faults of messages: poison, garbage, a reader that does not read, messages that come twice or late."""

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
from chaosplugin.contract import Chaos, Effect

from faultmatrix.rig import POOL
from faultmatrix.stage import Stage, fault
from kernelm.testing.harness import until
from kernelm_authority.identity import Authority
from kernelm_cli.home import read_up
from kernelm_sdk.bus import Bus
from kernelm_sdk.errors import Fault, KernelFault
from kernelm_sdk.events import digest

BULK = 100_000  # bytes of an event that nobody reads
PENDING_MB = 64  # nats-server's `max_pending`: what it keeps for a consumer before it cuts it off


@fault("poison: job", 3, short=True)
async def poison_job(stage: Stage) -> str:
    """A job that kills its instance at every attempt: it ends dead, with the reason, and its neighbours go on."""
    load = stage.load
    note = await load.job(3, poison=True)
    stage.over()
    record = note.record
    stage.check(record and record.state == "dead" and record.attempt == 3, f"a poisonous job is {record and record.state}")
    stage.check(record and record.fault and "SIGKILL" in record.why + record.fault.message,
                f"the record does not say why: {record and record.why!r}")  # fmt: skip
    return record.why[:60] if record else ""


@fault("poison: call", 2)
async def poison_call(stage: Stage) -> str:
    """A call whose handler ends the process: its caller gets a fault in time, the others repeat theirs."""
    try:
        await stage.rig.bus.call(Chaos.apply, Effect(f"{stage.load.run}-poison", crash=True), timeout_s=2.0)
        stage.complain("a call that kills its handler was answered")
    except KernelFault as refusal:
        return f"its caller: {refusal.code}"
    finally:
        stage.over()
    return ""


# ---- garbage -----------------------------------------------------------------------------------------------------


def garbage(rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body and headers that nobody should send."""
    body = rng.choice([
        lambda: rng.randbytes(rng.randrange(200)),
        lambda: b'{"id":' + rng.choice([b"1e999", b"null", b"[]", b"\"\\ud800\"", b"-0", b"{}", b"tru"]) + b"}",
        lambda: b"[" * rng.randrange(1, 5000),
        lambda: b'{"a":' * 900 + b"1" + b"}" * 900,
        lambda: b'{"id":"x","attempt":"' + b"9" * rng.randrange(1, 400) + b'"}',
        lambda: b'{"id":"\xff\xfe"}',
        lambda: b"",
        lambda: b'{"id":"' + b"x" * 900_000 + b'"',
    ])()  # fmt: skip
    headers = rng.choice([
        {}, {"Kernelm-Deadline": rng.choice(["soon", "nan", "-1", "1e400", ""])}, {"Nats-Service-Error-Code": "200"},
        {"ce-sequence": rng.choice(["-5", "many", "1.5", "9" * 40])}, {"ce-digest": "0" * 32, "ce-sequence": "7", "ce-boot": "x"},
        {"Kernelm-Last": "0"},
    ])  # fmt: skip
    return body, headers


CALLED = ("svc.chaos.v1.apply", "svc.trainer.v1.train", "svc.jobs.v1.submit", "svc.jobs.v1.find", "svc.work.v1.report",
          "svc.artifacts.v1.put", "svc.artifacts.v1.open", "svc.kernel.v1.hello", "svc.kernel.v1.enroll",
          "svc.kernel.v1.start-pool",
          "svc.scheduler.v1.decide", "inst.node-local.node.v1.start", "inst.jobs.plugin.v1.cancel")  # fmt: skip


@fault("fuzz: calls", 3)
async def fuzz_calls(stage: Stage) -> str:
    """Each is answered with a fault that blames the caller, and ends nothing."""
    rig, rng, blamed = stage.rig, stage.rng, 0
    before = {c: rig.pid(c) for c in ("kernel", "jobs", "node", "artifacts", "gateway")}
    instances = {r.instance for r in await rig.running(POOL)}
    for _ in range(60):
        subject = rng.choice(CALLED)
        body, headers = garbage(rng)
        try:
            answer = await rig.bus.request(f"{subject}.{rig.bus.user}", body, 5.0, headers or None)
            if subject.split(".")[1] in ("chaos", "trainer"):
                stage.complain(f"{subject} took {body[:60]!r}: {answer.data[:60]!r}")
        except Fault as refusal:
            blamed += refusal.whose == "client"
            if refusal.code == "internal" or (refusal.code == "timeout" and "Kernelm-Deadline" not in headers):
                stage.complain(f"{subject} on {body[:40]!r} {headers}: {refusal.whose}, {refusal.code}: {refusal.message[:80]}")
    for size in (1_048_577, 5_000_000):
        try:
            await rig.bus.request(f"svc.chaos.v1.apply.{rig.bus.user}", b"x" * size, 2.0)
            stage.complain(f"a call of {size} bytes was taken")
        except Fault as refusal:
            stage.check(refusal.code == "too_large", f"a call of {size} bytes: {refusal.code}")
    stage.over()
    stage.check(before == {c: rig.pid(c) for c in before}, "a service ended")
    stage.check(instances == {r.instance for r in await rig.running(POOL)}, "an instance of the plugin ended")
    return f"62 calls, {blamed} blamed on the caller"


@fault("fuzz: events", 3, fresh=True)
async def fuzz_events(stage: Stage) -> str:
    """Garbage under the names of real events: followers survive it, nobody acts on it, the audit counts it and goes on."""
    rig, rng = stage.rig, stage.rng
    held = [i for i in (await rig.state()).instances if i.pool == POOL and i.state == "ready"]
    for _ in range(40):
        kind = rng.choice(["chaos.tick", "plugin.state", "job.state", "artifact.stored", "no.such"])
        body, headers = garbage(rng)
        await rig.bus.append(f"evt.{kind}.{rig.bus.user}", body, headers or None, patience_s=5.0)
    lie = {"instance": held[0].id, "plugin": POOL, "pool": POOL, "state": "lost", "was": "ready", "reason": "a lie"}
    body = msgspec.json.encode(lie)
    await rig.bus.append(f"evt.plugin.state.{rig.bus.user}", body, {"ce-digest": digest(body)}, patience_s=5.0)
    psutil.Process(rig.pid("kernel")).send_signal(signal.SIGKILL)  # its successor audits the log
    stage.over()

    async def audited() -> str:
        return (await rig.state()).health.get("journal", "")

    try:
        text = await until(audited, 20.0, "the audit of a log with garbage")
    except AssertionError:
        stage.complain("the audit never ended: garbage in the log has stopped it")
        return "not audited"
    stage.check("damaged" in text, f"the audit says {text!r} of a log with garbage")
    await asyncio.sleep(0.5)
    taken = [j.record.why for j in stage.load.jobs if j.record and "a lie" in j.record.why]
    stage.check(not taken, f"a forged event took a job away: {taken}")
    return text[:60]


# ---- a reader that does not read -----------------------------------------------------------------------------------

READER = """
import asyncio, sys, uvloop
from pathlib import Path
from kernelm_authority.identity import admin
from kernelm_cli.home import read_up
from kernelm_sdk.bus import Bus
async def main():
    home = Path(sys.argv[1])
    bus = await Bus.connect(read_up(home).url, admin(home))
    async def handler(event): pass
    await bus.follow(handler)
    print("follows", flush=True)
    await asyncio.Event().wait()
uvloop.run(main())
"""


@fault("slow consumer", 3, fresh=True)
async def slow_consumer(stage: Stage) -> str:
    """A client follows all events and is frozen, while more are published than the broker may keep for it."""
    rig = stage.rig
    pipe = subprocess.PIPE
    reader = subprocess.Popen([sys.executable, "-c", READER, str(rig.home)], env=rig.environment, stdout=pipe)
    assert reader.stdout is not None
    await asyncio.to_thread(reader.stdout.readline)
    broker = psutil.Process(rig.pid("broker"))
    members = {n: psutil.Process(rig.pid(n)) for n in ("kernel", "jobs", "gateway", "artifacts", "node")}
    idle, mine = broker.memory_info().rss, {n: p.memory_info().rss for n, p in members.items()}
    quiet = len(stage.load.calls)
    reader.send_signal(signal.SIGSTOP)
    most, body = 0, b'"' + b"x" * BULK + b'"'
    try:
        for k in range(int(6 * PENDING_MB * 2**20 / BULK)):
            await rig.bus.append(f"evt.chaos.bulk.{rig.bus.user}", body, None, patience_s=20.0)
            if k % 20 == 0:
                most = max(most, broker.memory_info().rss)
    finally:
        reader.kill()
        reader.wait()
    stage.over()
    grown = {n: (p.memory_info().rss - mine[n]) / 2**20 for n, p in members.items()}
    slow = [c for c in stage.load.calls[quiet:] if c.took_s > 5.0]
    stage.figures["broker_mb"] = round((most - idle) / 2**20, 1)
    stage.check(most - idle < 4 * PENDING_MB * 2**20, f"the broker grew by {(most - idle) / 2**20:.0f} MB")
    stage.check(max(grown.values()) < 50, f"a member grew: {grown}")
    stage.check(not slow, f"{len(slow)} calls took more than 5 s")
    return f"broker +{(most - idle) / 2**20:.0f} MB at most, of {6 * PENDING_MB} MB that nobody read"


# ---- twice, late, out of order -------------------------------------------------------------------------------------


class Tap:
    """Hears what is handed over and reported, and sends it again: at once, late, in another order. It speaks with the
    kernel's own rights, since nobody else may put such a message on the wire."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self.heard, self.again = stage, [], 0
        self._bus: Bus
        self._mine: set[tuple[str, bytes]] = set()

    heard: list[tuple[str, bytes]]

    async def start(self) -> None:
        home: Path = self._stage.rig.home
        up = read_up(home)
        assert up is not None
        self._bus = await Bus.connect(up.url, Authority(home).credentials("tap"))
        for subject in ("inst.*.trainer.v1.train.jobs", "impl.jobs.work.v1.report.*", "impl.chaosplugin.chaos.v1.apply.*"):
            await self._bus.subscribe(subject, self._hear)

    async def _hear(self, subject: str, body: bytes, reply: str) -> None:
        if reply:  # what has none is our own
            self.heard.append((subject, body))
            if self._stage.rng.random() < 0.5:
                await self.send(subject, body)

    async def send(self, subject: str, body: bytes) -> None:
        self.again += 1
        await self._bus._client.publish(subject, body)

    async def stop(self) -> None:
        await self._bus.close()


@fault("delivered twice, late", 4, short=True)
async def redelivered(stage: Stage) -> str:
    """Dispatches, reports and calls are repeated at once and once more at the end, shuffled, when most are stale; the owner
    of a job is killed in between, so that there are stale epochs. Events come twice under the same id."""
    from faultmatrix.processes import in_the_middle_of_a_job

    stage.redelivered = True
    tap = Tap(stage)
    await tap.start()
    events: list[tuple[str, bytes, dict[str, str]]] = []
    client: Any = tap._bus._client

    async def event(msg: Any) -> None:
        if "Nats-Msg-Id" in (msg.headers or {}) and (msg.subject, msg.data, msg.headers) not in events:
            events.append((msg.subject, msg.data, dict(msg.headers)))
            await client.publish(msg.subject, msg.data, headers=msg.headers)

    await client.subscribe("evt.chaos.tick.*", cb=event)
    await asyncio.sleep(1.0)
    owner = await in_the_middle_of_a_job(stage)
    psutil.Process(owner.pid).send_signal(signal.SIGKILL)
    await asyncio.sleep(1.5)
    late = list(tap.heard)
    stage.rng.shuffle(late)
    for subject, body in late:
        await tap.send(subject, body)
    for subject, body, headers in events:
        await client.publish(subject, body, headers=headers)
    await client.flush()
    stage.over()
    await asyncio.sleep(0.5)
    await tap.stop()
    return f"{tap.again} messages, {2 * len(events)} events again"
