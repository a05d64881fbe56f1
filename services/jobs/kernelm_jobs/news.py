"""Who waits for news of jobs: a search of a thousand trials hears of each at once, and asks for none that has nothing to say."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping

from kernelm_contracts.jobs import JobRecord
from kernelm_jobs.states import FINAL
from kernelm_jobs.table import Table

WAIT_S = 20.0  # most: a call has a deadline of its own


class News:
    """Questions that wait for their answer."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)  # job -> who waits for it
        table.listeners.append(self._changed)

    def _changed(self, job: JobRecord) -> None:
        for event in self._waiting.get(job.id, ()):
            event.set()

    async def of(self, known: Mapping[str, float], wait_s: float) -> list[JobRecord]:
        """Those of the jobs `known` (with their `heard`) that are over or were heard of since, as soon as there is one or `wait_s`
        have passed. ClientFault "not_found" for one that there isn't."""
        event = asyncio.Event()
        for id in known:
            self._waiting[id].add(event)
        try:
            async with asyncio.timeout(min(wait_s, WAIT_S)):
                while not (found := self._found(known)):
                    await event.wait()
                    event.clear()
                return found
        except TimeoutError:
            return self._found(known)
        finally:
            for id in known:
                self._waiting[id].discard(event)
                if not self._waiting[id]:
                    del self._waiting[id]

    def _found(self, known: Mapping[str, float]) -> list[JobRecord]:
        jobs = [(self._table.jobs.need(id), heard) for id, heard in known.items()]
        return [job for job, heard in jobs if job.state in FINAL or job.heard > heard]
