"""The trials of a search as jobs: what the study asks for is submitted, watched, given up, and told to it. Effects only.

A trial is in the search's checkpoint before its job is submitted. Whoever goes on after a crash submits it again: the job table
knows a twin that is under way, or its result, by its content.
"""

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable

from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.optimizer import OptimizeRequest
from kernelm_contracts.server import Measured, Measurement, MeasureRequest
from kernelm_contracts.trainer import Trained
from kernelm_optimizer.children import ENDED, Children, result_of
from kernelm_optimizer.choice import excess, values_of
from kernelm_optimizer.settings import Settings
from kernelm_optimizer.study import Study, Trial
from kernelm_sdk.errors import Fault, KernelFault, PluginFault

MEASURED = frozenset({"latency", "size", "memory"})  # objectives that training alone does not tell
WAIT_S = 10.0  # for news of the jobs


class Trials:
    """Carries out the trials of `study` until there are no more or the `deadline` (of `time.monotonic`) has passed.

    `save` makes the study durable, `note` is told how far it got. Faults of the system end the search, to be tried again; whatever
    is wrong with one trial ends that trial.
    """

    def __init__(self, study: Study, request: OptimizeRequest, children: Children, settings: Settings, deadline: float,
                 save: Callable[[], Awaitable[None]], note: Callable[[float, str], None]) -> None:  # fmt: skip
        assert request.search is not None
        self.study, self.request, self.search, self.children, self.settings = study, request, request.search, children, settings
        self.deadline, self._save, self._note = deadline, save, note
        self._measures = bool(MEASURED.intersection(self.search.objectives)
                              or request.max_latency_ms or request.max_bytes or request.max_memory_mb)  # fmt: skip
        self._trained: dict[int, Trained] = {}
        self._heard: dict[str, float] = {}  # job -> last sign of it that was looked at
        self._trials: defaultdict[str, list[Trial]] = defaultdict(list)  # job -> trials that wait for it

    async def run(self) -> None:
        """All of it."""
        await asyncio.gather(*(self._submit(trial) for trial in self.study.running()))
        while True:
            await self._start_more()
            if not self._trials:
                await self._save()
                return
            if (left := self.deadline - time.monotonic()) <= 0:
                await self._give_up()
                return
            known = {job: self._heard[job] for job in self._trials}
            for record in await self.children.news(known, min(left, WAIT_S)):
                await self._take(record)
            self._note(self._share(), self._text())

    async def _start_more(self) -> None:
        room = self.search.parallel - len(self.study.running())
        while room > 0 and time.monotonic() < self.deadline:
            asked = await asyncio.to_thread(self.study.ask, room)
            if not asked:
                return
            await self._save()
            await asyncio.gather(*(self._submit(trial) for trial in asked))
            room = self.search.parallel - len(self.study.running())  # what was done before is done at once

    async def _submit(self, trial: Trial) -> None:
        """Hand a trial's training to the job table, or its measurement where it is trained."""
        if trial.model:
            await self._measure(trial)
            return
        try:
            record = await self.children.submit(f"train-{trial.name}", "trainer/1.train", self.study.request(trial),
                                                self.settings.train, self.search.preemptible)  # fmt: skip
        except KernelFault:
            raise
        except Fault as fault:
            self.study.tell(trial, "failed", why=fault.message)
            return
        trial.job = record.id
        await self._follow(trial, record)

    async def _measure(self, trial: Trial) -> None:
        request = MeasureRequest((trial.model,), self.request.dataset, rounds=1)
        record = await self.children.submit(f"measure-{trial.name}", "server/1.measure", request, self.settings.measure,
                                            self.search.preemptible)  # fmt: skip
        trial.measuring = record.id
        await self._follow(trial, record)

    async def _follow(self, trial: Trial, record: JobRecord) -> None:
        if record.state in ENDED:
            await self._ended(trial, record)
        else:
            self._heard.setdefault(record.id, 0.0)
            self._trials[record.id].append(trial)

    async def _take(self, record: JobRecord) -> None:
        """What there is to know of a job."""
        self._heard[record.id] = record.heard
        if record.state in ENDED:
            del self._heard[record.id]
            for trial in self._trials.pop(record.id):
                await self._ended(trial, record)
            return
        metrics = record.progress.metrics
        if "validation_accuracy" not in metrics or "epoch" not in metrics:
            return
        waiting = self._trials[record.id]
        hopeless = [t for t in waiting if self.study.report(t, round(metrics["epoch"]), metrics["validation_accuracy"])]
        if hopeless and len(hopeless) == len(waiting):
            del self._heard[record.id], self._trials[record.id]
            why = f"given up after epoch {metrics['epoch']:.0f}, at accuracy {metrics['validation_accuracy']:.4f}"
            await self.children.cancel(record.id)
            for trial in hopeless:
                self.study.tell(trial, "pruned", why=why)

    async def _ended(self, trial: Trial, record: JobRecord) -> None:
        try:
            if trial.measuring == record.id:
                measured = result_of(record, Measured).measurements
                found = next((m for m in measured if m.model == trial.model), None)
                if found is None:
                    raise PluginFault("invalid_result", f"server/1.measure (job {record.id}) gave no figures for {trial.model}")
                self._tell(trial, found)
                return
            trained = result_of(record, Trained)
            trial.model, self._trained[trial.number] = trained.model, trained
        except Fault as fault:
            self.study.tell(trial, "failed", why=fault.message)
            return
        if self._measures:
            await self._measure(trial)
        else:
            self._tell(trial, None)

    def _tell(self, trial: Trial, measured: Measurement | None) -> None:
        scores = measured.scores if measured else self._trained[trial.number].validation
        trial.excess, trial.measurement = excess(self.request, measured) if measured else {}, measured
        found = values_of(scores, measured)
        values = tuple(found[objective] for objective in self.search.objectives)
        if all(map(math.isfinite, values)):
            self.study.tell(trial, "done", values)
        else:
            self.study.tell(trial, "failed", why=f"its figures are no numbers: {values}")

    async def _give_up(self) -> None:
        """The budget is spent: nothing of a trial that is under way counts."""
        for job, trials in list(self._trials.items()):
            record = await self.children.give_up(job)
            waited = f" before it began: {self.children.waited[job].text}" if job in self.children.waited else ""
            for trial in trials:
                if record.state == "done" and (trial.measuring == job or not self._measures):  # just before
                    await self._ended(trial, record)
                else:
                    self.study.tell(trial, "late", why=f"the budget of {self.request.budget_s:g} s was spent{waited}")
        self._trials.clear()
        await self._save()

    def _share(self) -> float:
        ended = len(self.study.trials) - len(self.study.running())
        spent = 1.0 - max(self.deadline - time.monotonic(), 0.0) / max(self.request.budget_s, 1e-9)
        return min(max(ended / self.study.most, spent), 1.0)

    def _text(self) -> str:
        count = Counter(trial.state for trial in self.study.trials)
        states = ", ".join(f"{count[state]} {state}" for state in ("done", "running", "pruned", "failed") if count[state])
        best = self.study.best(1)
        figures = ", ".join(f"{o} {v:.4g}" for o, v in zip(self.search.objectives, best[0].values, strict=True)) if best else ""
        return f"trials: {states} of {self.study.most}" + (f"; best {best[0].name}: {figures}" if best else "")
