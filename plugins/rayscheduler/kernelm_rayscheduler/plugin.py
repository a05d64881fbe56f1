"""`scheduler/1` on Ray: what should be there is made so in Ray, and what Ray says becomes decisions."""

import asyncio
from itertools import chain
from typing import Any

from kernelm_contracts.scheduler import ClusterState, Decision, Decisions, Scheduler
from kernelm_rayscheduler.groups import Groups
from kernelm_rayscheduler.mapping import Account, Wanted, answer, asked, held, lacking, order, scaled, stale, waits
from kernelm_rayscheduler.settings import Settings
from kernelm_sdk.plugin import Context, Plugin


class RayScheduler(Plugin, Scheduler):
    """Not pure, unlike others: a question leaves groups in Ray, which the next one takes up."""

    Settings = Settings
    resizes = False

    def __init__(self, context: Context, settings: Settings) -> None:
        super().__init__(context, settings)
        self._groups = Groups(settings)
        self._queue: list[str] = []  # the waiting jobs in Ray's queue, in its order
        self._turn = asyncio.Lock()

    async def on_start(self) -> None:
        await asyncio.to_thread(self._groups.connect)

    async def on_stop(self) -> None:
        await asyncio.to_thread(self._groups.close)

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        async with self._turn:
            return Decisions(request.version, tuple(await asyncio.to_thread(self._decided, request)))

    def _decided(self, state: ClusterState) -> list[Decision]:
        replicas, waiting = lacking(state), order(state)
        jobs = [*chain.from_iterable(replicas.values()), *waiting]
        hindered, wanted = dict[str, str](), dict[str, Wanted]()
        allowed = Account(state)
        for job in jobs:
            group = allowed.over(job) or asked(job, state)
            if isinstance(group, str):
                hindered[job.id] = group
            elif len(wanted) < self.settings.queued:
                wanted[job.id] = group
                allowed.hold(job.tenant, job.request, job.members)
        self._bring_about(held(state), wanted)
        groups = self._groups.settled(wanted)
        self._queue = [id for id in wanted if id in groups and not groups[id].nodes]
        account = Account(state)
        found = {job.id: waits(job, hindered[job.id], "an instance, a node, or a larger quota") if job.id in hindered
                 else answer(job, groups.get(job.id), account) for job in jobs}  # fmt: skip
        models = [(m, [found[job.id] for job in replicas[m.name]]) for m in state.models if m.name in replicas]
        return [*chain.from_iterable(scaled(model, answers) for model, answers in models), *(found[job.id] for job in waiting)]

    def _bring_about(self, running: dict[str, Wanted], waiting: dict[str, Wanted]) -> None:
        """Give up the groups that should not be, then ask for those that should: what runs, then those who wait, in order. In Ray's
        queue who came first is first: from the first one on that others have overtaken all queue anew; all of them when something
        has become free, so that Ray looks at once and not at its next attempt."""
        there = self._groups.table()
        gone = stale(there, {**running, **waiting})
        queued = [id for id in waiting if id in there and id not in gone and not there[id].nodes]
        line = [id for id in waiting if id in queued or id not in there or id in gone]
        overtaken = next((n for n, id in enumerate(line) if n >= len(self._queue) or id != self._queue[n]), len(line))
        first = 0 if gone else overtaken
        self._groups.remove([*gone, *(id for id in line[first:] if id in queued)])
        for id, group in running.items():
            if id not in there or id in gone:
                self._groups.create(group)
        for id in line[first:]:
            self._groups.create(waiting[id])
