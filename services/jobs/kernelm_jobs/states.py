"""The states of a job, as ONE table. `python -m kernelm_jobs.states` prints it as a Mermaid diagram."""

import time
from collections.abc import Iterable
from typing import Any

from msgspec import structs

from kernelm_contracts.jobs import JobRecord, JobState
from kernelm_sdk import transitions
from kernelm_sdk.errors import FaultBody

# (state, what happens) -> next state. What is not in the table can't happen: `advance` raises and changes nothing.
TRANSITIONS: dict[tuple[str, str], JobState] = {
    ("", "submit"): "queued",
    ("", "reuse"): "done",              # a job of the same content has a result; this one gets a copy
    ("queued", "place"): "placed",      # node, instance and a new epoch are on record; from here on it holds resources
    ("queued", "reject"): "dead",       # no node could ever run it
    ("queued", "cancel"): "cancelled",
    ("placed", "accept"): "running",    # the instance took it, or reported before its answer came
    ("running", "accept"): "running",   # the answer came after the first report
    ("placed", "decline"): "queued",    # the instance was busy or gone: nothing was begun, no attempt is counted
    ("placed", "fail"): "queued",       # fault, lost instance or silence: again, from the last checkpoint
    ("running", "fail"): "queued",
    ("placed", "exhaust"): "dead",      # the same, after the last attempt, or a fault that does not get better
    ("running", "exhaust"): "dead",
    ("placed", "finish"): "done",       # the result came before the answer to the dispatch
    ("running", "finish"): "done",
    ("running", "serve"): "running",    # a replica's pool answers under its name; it keeps its resources
    ("running", "supersede"): "done",   # another replica has taken over the name
    ("placed", "preempt"): "queued",    # it made room for another job: no attempt is counted
    ("running", "preempt"): "queued",
    ("running", "move"): "placed",      # at a checkpoint, to what was decided: a new epoch, more or fewer cores, or elsewhere
    ("placed", "cancel"): "cancelled",
    ("running", "cancel"): "cancelled",
}  # fmt: skip
HOLDING = frozenset({"placed", "running"})  # these hold what they have requested
FINAL = frozenset({"done", "dead", "cancelled"})
LIVE = HOLDING | {"queued"}


def step(state: str, happening: str) -> JobState:
    """The next state; ClientFault "illegal_transition" where the table has none."""
    return transitions.step(TRANSITIONS, state, happening, f"a job that is {state or 'new'!r}")


def advance(record: JobRecord, happening: str, **changes: Any) -> JobRecord:
    """`record` after `happening`, with `changes` and the time of a start or an end; ClientFault if it can't happen."""
    state = step(record.state, happening)
    if state == "running" and record.state != "running":
        changes["started"] = time.time()
    if state in FINAL:
        changes["finished"] = time.time()
    if record.state == "running" and state != "running":
        members = sum(share.members for share in record.allocation) or 1
        changes["served_s"] = record.served_s + members * max(time.time() - record.started, 0.0)
    if record.state in HOLDING and (state not in HOLDING or happening == "move"):
        changes |= {"stopping": 0.0, "target": (), "heir": "", "meeting": ""}
    return structs.replace(record, state=state, **changes)


def failed(record: JobRecord, fault: FaultBody, why: str = "") -> JobRecord:
    """`record` after its attempt failed: queued again, or dead when the attempts are used up or bad input is to blame,
    which does not get better. Its node stays on record as the one to avoid, its checkpoint as the one to resume from."""
    attempt = record.attempt + 1
    damaged = fault.code in ("corrupt_artifact", "not_found") and fault.details.get("digest", "") == record.checkpoint != ""
    hopeless = fault.whose == "client" and not fault.retriable and not damaged
    happening = "exhaust" if hopeless or attempt >= record.spec.attempts else "fail"
    checkpoint = "" if damaged else record.checkpoint  # a damaged one costs the progress, not the job
    return advance(record, happening, attempt=attempt, fault=fault, why=why or fault.message, checkpoint=checkpoint)


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    return transitions.diagram(TRANSITIONS, FINAL)


def latest_checkpoint(key: str, jobs: Iterable[JobRecord]) -> str:
    """The last checkpoint of a job that does the same work (equal content key): of an earlier run that was changed in
    another stage, say, or was cancelled halfway. None that one of these jobs could not go on from; "" if there is no other."""
    same = [job for job in jobs if job.key == key]
    left = {job.left for job in same}
    twins = [job for job in same if job.checkpoint and job.checkpoint not in left]
    return max(twins, key=lambda job: (job.progress.fraction, job.heard)).checkpoint if twins else ""


if __name__ == "__main__":
    print(diagram())
