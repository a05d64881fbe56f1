"""What became of every promise of a run: what was lost, what was done twice, which job went back."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import msgspec
from chaosplugin import journal
from chaosplugin.contract import Tick

from faultmatrix.load import JobNote, Load
from kernelm_contracts.jobs import JobChanged, JobRecord
from kernelm_sdk.bus import Bus
from kernelm_sdk.events import received
from kernelm_sdk.system import ArtifactName, Artifacts


@dataclass
class Verdict:
    """Complaints, one line each. `calls`, `events`, `jobs`: how many promises were checked."""

    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    calls: int = 0
    events: int = 0
    jobs: int = 0


async def judge(load: Load, bus: Bus, *, redelivered: bool = False, damaged: bool = False) -> Verdict:
    """The verdict on a finished load. `redelivered`: the fault itself repeats messages, so that handlers see a call twice;
    effects must be single all the same. `damaged`: the fault itself destroys events; only those that are there are judged."""
    verdict = Verdict(calls=len(load.calls), events=len(load.acknowledged), jobs=len(load.jobs))
    lines = [line for line in journal.read(load.rig.folder)]
    _calls(load, lines, verdict, redelivered)
    await _events(load, bus, verdict, damaged)
    by_job: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if "job" in line:
            by_job[line["job"]].append(line)
    for note in load.jobs:
        await _job(load, note, by_job, bus, verdict)
    return verdict


def _calls(load: Load, lines: list[dict[str, Any]], verdict: Verdict, redelivered: bool) -> None:
    handled = Counter((line["id"], line["attempt"]) for line in lines if line["what"] == "call")
    for call in load.calls:
        if call.failure:
            verdict.lost.append(f"call {call.id}, {call.attempts} tries: {call.failure}")
        elif not (load.rig.folder / "effects" / call.id).exists():
            verdict.lost.append(f"call {call.id} was answered and has no effect")
        for attempt in range(1, call.attempts + 1):
            if handled[call.id, attempt] > 1 and not redelivered:
                verdict.duplicated.append(f"call {call.id}, try {attempt}: handled {handled[call.id, attempt]} times")


async def _events(load: Load, bus: Bus, verdict: Verdict, damaged: bool) -> None:
    stored: dict[int, list[int]] = defaultdict(list)
    done: Counter[str] = Counter()
    jobs = {note.record.id for note in load.jobs if note.record}
    async for sequence, subject, body, headers in bus.read("EVT", first=load.rig.first_event):
        event = received(subject, body, headers, sequence)
        if isinstance(event.event, Tick) and event.event.run == load.run:
            stored[event.event.n].append(sequence)
        elif isinstance(event.event, JobChanged) and event.event.state == "done" and event.event.job in jobs:
            done[event.event.job] += 1
    for n, why in load.refused.items():
        verdict.lost.append(f"event {n} was not acknowledged in time: {why}")
    for n, sequence in load.acknowledged.items():
        if not stored[n] and not damaged:
            verdict.lost.append(f"event {n} was acknowledged as {sequence} and is not there")
    verdict.duplicated += [f"event {n} is stored as {s}" for n, s in stored.items() if len(s) > 1]
    verdict.duplicated += [f"job {job} was said to be done {times} times" for job, times in done.items() if times > 1]


async def _job(load: Load, note: JobNote, by_job: dict[str, list[dict[str, Any]]], bus: Bus, verdict: Verdict) -> None:
    record = note.record
    if record is None or note.failure:
        verdict.lost.append(f"job {note.name}: {note.failure}")
        return
    if record.state != ("dead" if note.poison else "done"):
        verdict.lost.append(f"job {record.id} is {record.state}: {record.why}")
    if not note.poison:
        _result(load, note, record, verdict)
    lines = by_job[record.id]
    starts = [(line["epoch"], line["step"], line["by"]) for line in lines if line["what"] == "start"]
    for epoch, times in Counter(epoch for epoch, _, _ in starts).items():
        if times > 1:
            verdict.duplicated.append(f"job {record.id}/{epoch} was begun {times} times")
    saved = {line["epoch"]: (line["step"], line["digest"]) for line in lines if line["what"] == "saved"}
    for epoch, (step, _) in saved.items():
        for later, begin, by in starts:
            if later > epoch and begin < step and not note.may_restart:
                verdict.lost.append(f"job {record.id}/{later} of {by} began at step {begin}; {epoch} had saved step {step}")
    if record.checkpoint and saved and not note.may_restart:
        kept = await bus.call(Artifacts.describe, ArtifactName(record.checkpoint), timeout_s=5.0, patience_s=20.0)
        last = max(step for step, _ in saved.values())
        if kept.metadata.get("step", 0) < last:
            verdict.lost.append(f"job {record.id}: its checkpoint went back to step {kept.metadata.get('step')} from {last}")


def _result(load: Load, note: JobNote, record: JobRecord, verdict: Verdict) -> None:
    total = 0
    for step in range(1, note.steps + 1):
        total += step**2
        effect = load.rig.folder / "effects" / f"{record.id}.{step}"
        if not record.reused and (not effect.exists() or effect.read_text() != str(total)):
            verdict.lost.append(f"job {record.id}: step {step} has no effect, or a wrong one")
    if record.state == "done" and record.result.get("parameters") != total:
        verdict.lost.append(f"job {record.id}: result {msgspec.json.encode(record.result)!r}, not {total}")
