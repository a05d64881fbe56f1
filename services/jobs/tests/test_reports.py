"""What a report becomes where another has changed the job meanwhile: the change is made once more, from the start."""

from collections.abc import Callable
from typing import Any, cast

from kernelm_contracts.jobs import JobRecord, JobSpec, Share
from kernelm_jobs.reports import Reports
from kernelm_sdk.system import Report


class Contested:
    """A table in which each write is refused once, as when a record has a newer revision by now."""

    def __init__(self, job: JobRecord) -> None:
        self.job, self.jobs = job, self
        self.listeners: list[Callable[[JobRecord], None]] = []

    def need(self, _: str) -> JobRecord:
        return self.job

    async def move(self, _: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        change(self.job)
        self.job = change(self.job)
        return self.job


class Quiet:
    """The rest of the service, which has nothing to do here."""

    def spawn(self, _: Any) -> None: ...

    def forget(self, job: JobRecord, before: str) -> None: ...


async def test_a_checkpoint_is_on_record_though_its_first_write_was_refused() -> None:
    spec = JobSpec("j", "trainer/1.train", {})
    job = JobRecord("j", spec, "k", "running", 4, node="a", instance="t-1", allocation=(Share("a", 2),))
    table = Contested(job)
    quiet = cast("Any", Quiet())
    reports = Reports(cast("Any", table), quiet, quiet, quiet)
    for checkpoint in ("sha256:1", "sha256:2", "sha256:1"):  # the last is told once more, and late
        await reports.report(Report("j", 4, checkpoint=checkpoint), "t-1")
    assert table.job.checkpoint == "sha256:2"
