"""The table of states: every pair that is not in it raises, and changes nothing."""

import itertools

import msgspec
import pytest

from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_jobs.states import FINAL, HOLDING, TRANSITIONS, advance, diagram, failed, latest_checkpoint
from kernelm_jobs.watch import lost
from kernelm_sdk.errors import ClientFault, FaultBody
from kernelm_sdk.system import Progress

STATES = ("queued", "placed", "running", "done", "dead", "cancelled")
HAPPENINGS = sorted({h for _, h in TRANSITIONS})


def record(state: str = "running", **more) -> JobRecord:
    fields = {"epoch": 2, "node": "local"} | more
    return JobRecord("j", JobSpec("train", "trainer/1.train", {}, attempts=3), "key", state, **fields)


@pytest.mark.parametrize(("state", "happening"), list(itertools.product(STATES, HAPPENINGS)))
def test_what_is_not_in_the_table_changes_nothing(state: str, happening: str) -> None:
    job = record(state)
    before = msgspec.json.encode(job)
    if (state, happening) in TRANSITIONS:
        assert advance(job, happening).state == TRANSITIONS[state, happening]
    else:
        with pytest.raises(ClientFault, match="can't happen") as refusal:
            advance(job, happening, node="elsewhere")
        assert refusal.value.code == "illegal_transition"
    assert msgspec.json.encode(job) == before


def test_a_job_that_has_lost_its_last_instance_is_promised_nothing() -> None:
    assert lost(record(attempt=1), "gone").remedy == "it goes on from its last checkpoint"
    last = record(attempt=2, instance="trainer-1")
    fault = lost(last, "gone")
    assert failed(last, fault, "gone").state == "dead"
    assert fault.remedy.startswith("logs/trainer-1.log in its node's home says more")


def test_final_states_have_no_way_out_and_all_states_are_reachable() -> None:
    assert not [pair for pair in TRANSITIONS if pair[0] in FINAL]
    assert set(TRANSITIONS.values()) == set(STATES)
    assert {s for (s, h) in TRANSITIONS if h in ("accept", "fail", "exhaust", "finish")} == HOLDING


def test_times_are_set_by_the_transition() -> None:
    started = advance(record("placed"), "accept")
    assert started.started > 0
    assert started.finished == 0
    assert advance(started, "accept").started == started.started
    assert advance(started, "finish").finished >= started.started


def test_failures_are_retried_until_the_attempts_are_used_up() -> None:
    fault = FaultBody("plugin", "internal", "boom")
    job = record(checkpoint="sha256:c")
    states = []
    while job.state in HOLDING:
        job = failed(job, fault)
        states.append(job.state)
        if job.state == "queued":
            assert job.checkpoint == "sha256:c"
            job = advance(advance(job, "place", epoch=job.epoch + 1), "accept")
    assert states == ["queued", "queued", "dead"]
    assert (job.attempt, job.fault, job.why) == (3, fault, "boom")


def test_bad_input_does_not_get_better() -> None:
    assert failed(record(), FaultBody("client", "invalid", "no such label")).state == "dead"
    assert failed(record(), FaultBody("client", "busy", "later", retriable=True)).state == "queued"


@pytest.mark.parametrize(("whose", "code"), [("kernel", "corrupt_artifact"), ("client", "not_found")])
def test_a_damaged_checkpoint_costs_the_progress_and_not_the_job(whose: str, code: str) -> None:
    fault = FaultBody(whose, code, "state.json differs", details={"digest": "sha256:c"})  # type: ignore[arg-type]
    again = failed(record(checkpoint="sha256:c"), fault)
    assert (again.state, again.checkpoint, again.why) == ("queued", "", "state.json differs")
    other = failed(record(checkpoint="sha256:other"), fault)
    assert other.checkpoint == "sha256:other"
    assert other.state == ("dead" if whose == "client" else "queued"), "a missing input does not get better"


def test_the_diagram_shows_every_transition() -> None:
    assert diagram().count("-->") == len(TRANSITIONS) + len(FINAL)


def test_the_furthest_twins_checkpoint_is_taken_and_none_that_one_of_them_could_not_go_on_from() -> None:
    old = record("cancelled", checkpoint="sha256:old", progress=Progress(0.9))
    assert latest_checkpoint("key", [old]) == "sha256:old"
    anew = record("cancelled", checkpoint="sha256:old", left="sha256:old", progress=Progress(0.1))
    assert latest_checkpoint("key", [old, anew]) == ""
    later = msgspec.structs.replace(anew, checkpoint="sha256:new", progress=Progress(0.3))
    assert latest_checkpoint("key", [old, later]) == "sha256:new"
    other = msgspec.structs.replace(later, key="of another version", checkpoint="")
    assert latest_checkpoint("key", [old, other]) == "sha256:old", "what that one can't read, this one may"
