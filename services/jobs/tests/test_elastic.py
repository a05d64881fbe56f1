"""What the scheduler is told of jobs that grow and shrink, and what a decision to change them makes of their records."""

from msgspec.structs import replace

from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_contracts.scheduler import Decision, Point, Share
from kernelm_jobs.elastic import RATE, curve, terms
from kernelm_jobs.holdings import reserved
from kernelm_jobs.moving import called_off, growth, moved, retargeted
from kernelm_jobs.rounds import Crews, Worker, choose_all
from kernelm_sdk.system import Progress, Resources

SPEC = JobSpec("j", "trainer/1.train", {}, Resources(0.5, 100), most=3)
JOB = JobRecord("j", SPEC, "k", "running", 4, node="a", instance="t-1", allocation=(Share("a", 2),), checkpoint="c", started=1.0)
READY = [Worker("t-2", "b", "trainer", "1", ("trainer/1",), 1), Worker("t-3", "b", "trainer", "1", ("trainer/1",), 0),
         Worker("t-4", "b", "trainer", "1", ("trainer/1",), 2)]  # fmt: skip


def points(job: JobRecord) -> tuple[Point, ...]:
    return curve(job)[0].points


def test_what_was_measured_counts_and_what_was_not_is_worth_a_try() -> None:
    assert points(JOB) == tuple(Point(n, RATE * n) for n in (1, 2, 3))
    assert points(replace(JOB, spec=replace(SPEC, estimate_s=100.0)))[0] == Point(1, 0.01)
    measured = replace(JOB, rates={"1": 0.02, "2": 0.03})  # the second one adds half
    assert points(measured) == (Point(1, 0.02), Point(2, 0.03), Point(3, 0.03 * 3 / 2))
    assert points(replace(JOB, rates={"2": 0.03}))[0] == Point(1, 0.015)
    halfway = terms(replace(JOB, progress=Progress(0.25)))
    assert (halfway["most"], halfway["done"], halfway["remaining"]) == (3, 0.25, 0.75)
    assert terms(replace(JOB, spec=replace(SPEC, most=1))) == {}


def test_a_resize_takes_place_on_record_then_at_the_checkpoint() -> None:
    decision = Decision("j", "resize", "a", "wide:trainer", "why not", 0.0, (Share("a", 3),))
    assert growth(JOB, decision) == (Share("a", 1),)
    change, heir = retargeted(JOB, decision, Crews(READY))
    assert not isinstance(change, str)
    told = change(JOB)
    assert (heir, told.state, told.target, told.heir) == ("t-1", "running", (Share("a", 3),), "t-1")
    assert told.stopping > 0
    assert reserved(told) == (Share("a", 3),)  # held from now on
    assert change(told) is told  # one at a time
    assert change(replace(JOB, epoch=5)) == replace(JOB, epoch=5)
    after = moved(told)
    assert (after.state, after.epoch, after.allocation, after.target, after.stopping) == ("placed", 5, (Share("a", 3),), (), 0.0)
    assert after.served_s > 0
    back = called_off(told)
    assert (back.state, back.epoch, back.allocation, back.target, back.stopping) == ("running", 4, (Share("a", 2),), (), 0.0)


def test_a_migration_needs_a_free_instance_there_and_holds_both_places() -> None:
    decision = Decision("j", "migrate", "b", "wide:trainer", "nearer", 0.0, (Share("b", 2),))
    assert growth(JOB, decision) == (Share("b", 2),)
    change, heir = retargeted(JOB, decision, Crews(READY))
    assert not isinstance(change, str)
    assert heir == "t-4"  # with the most room
    assert set(reserved(change(JOB))) == {Share("a", 2), Share("b", 2)}
    assert retargeted(JOB, decision, Crews(READY[1:2]))[0] == "migrate: no instance on b is free for it"


def test_what_can_not_be_done_is_said() -> None:
    spread = Decision("j", "resize", "a", "wide:trainer", "", 0.0, (Share("a", 1), Share("b", 2)))
    assert "one instance's" in str(retargeted(JOB, spread, Crews(READY))[0])
    fixed = replace(JOB, spec=replace(SPEC, most=1), allocation=())
    wider = Decision("j", "resize", "a", "trainer", "", 0.0, (Share("a", 3),))
    assert "not 3 times" in str(retargeted(fixed, wider, Crews(READY))[0])
    gang = replace(fixed, gang=("t-1", "t-9"))
    elsewhere = Decision("j", "migrate", "b", "trainer", "", 0.0, (Share("b", 1),))
    assert "preempt it" in str(retargeted(gang, elsewhere, Crews(READY))[0])


def test_a_gang_gets_another_instance_for_every_member_or_none() -> None:
    spec = replace(SPEC, most=1, gang=2)
    place = Decision("j", "place", "b", "trainer", "", 0.0, (Share("b", 2),))
    assert [w.instance for w in choose_all(place, spec, Crews(READY))] == ["t-4", "t-2"]
    assert choose_all(replace(place, allocation=(Share("b", 3),)), replace(spec, gang=3), Crews(READY)) == []
