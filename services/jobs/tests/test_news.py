"""Waiting for news of jobs: nothing is missed, nothing is said twice, and nobody waits who need not."""

import asyncio
from typing import Any

import pytest
from msgspec import structs

from kernelm_contracts.jobs import JobRecord, JobSpec
from kernelm_jobs.news import News
from kernelm_sdk.errors import ClientFault


class Jobs(dict[str, JobRecord]):
    def need(self, id: str) -> JobRecord:
        if id not in self:
            raise ClientFault("not_found", f"there is no job {id!r}")
        return self[id]


class Table:
    """What `News` sees of the job table."""

    def __init__(self, *ids: str) -> None:
        spec = JobSpec("job", "trainer/1.train", {})
        self.jobs, self.listeners = Jobs({id: JobRecord(id, spec, "key", "running", heard=1.0) for id in ids}), []  # type: ignore[var-annotated]

    def change(self, id: str, **fields: Any) -> None:
        self.jobs[id] = structs.replace(self.jobs[id], **fields)
        for listener in self.listeners:
            listener(self.jobs[id])


async def test_the_first_news_ends_the_wait_and_the_rest_is_said_the_next_time() -> None:
    table = Table("a", "b", "c")
    news = News(table)  # type: ignore[arg-type]
    known = {"a": 1.0, "b": 1.0}
    asking = asyncio.create_task(news.of(known, 20.0))
    await asyncio.sleep(0)
    table.change("c", state="done")  # nobody asked
    table.change("b", why="another reason")  # nothing was heard of it
    await asyncio.sleep(0)
    assert not asking.done()
    table.change("b", heard=2.0)
    assert [job.id for job in await asking] == ["b"]
    table.change("a", state="dead")
    assert [job.id for job in await news.of(known | {"b": 2.0}, 20.0)] == ["a"]
    assert await news.of({"b": 2.0}, 0.0) == []
    assert not news._waiting


async def test_two_may_wait_for_the_same_job() -> None:
    table = Table("a")
    news = News(table)  # type: ignore[arg-type]
    both = [asyncio.create_task(news.of({"a": 1.0}, 20.0)) for _ in range(2)]
    await asyncio.sleep(0)
    table.change("a", state="cancelled")
    assert [[job.state for job in found] for found in await asyncio.gather(*both)] == [["cancelled"]] * 2


async def test_a_job_that_is_not_there_is_no_reason_to_wait() -> None:
    with pytest.raises(ClientFault, match="there is no job 'z'"):
        await News(Table("a")).of({"z": 0.0}, 20.0)  # type: ignore[arg-type]
