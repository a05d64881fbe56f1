"""Measurements by the server that will serve: jobs `server/1.measure`, which may wait for their cores for so long and no longer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.server import Measured, Measurement, MeasureRequest
from kernelm_optimizer.children import Children, Wait, result_of
from kernelm_optimizer.settings import Settings
from kernelm_sdk.errors import ClientFault, PluginFault


class Unmeasured(Exception):
    """A measurement had not begun when its time was over, and was cancelled."""

    def __init__(self, wait: Wait) -> None:
        super().__init__(wait.text)
        self.wait = wait

    def __str__(self) -> str:
        return f"its measurement did not begin: {self.wait.text}"

    def fault(self, message: str) -> ClientFault:
        """What the caller of a job is told that has no figures because of this."""
        start = f"{self.wait.remedy}, or" if self.wait.remedy else "free what the job waits for, or"
        return ClientFault("budget_too_small", message, f"{start} raise budget_s; what was trained and made is found again")


class Measuring:
    """The measurements of one search or compression on `dataset`. One waits in the queue until the `deadline` (of
    `time.monotonic`), when the budget is spent, and for `settings.wait_s` at least; once it is under way it is let."""

    def __init__(self, children: Children, settings: Settings, dataset: str, deadline: float) -> None:
        self.children, self.settings, self.dataset, self.deadline = children, settings, dataset, deadline
        self.conditions: dict[str, str] = {}  # of the last one

    async def run(self, phase: str, models: Iterable[str], rounds: int, note: Callable[[float, str], None],
                  split: Literal["validation", "test"] = "validation") -> dict[str, Measurement]:  # fmt: skip
        """Digest -> measurement, all from one interleaved run of the server; `note` is told its share and how it gets on.
        `Unmeasured`, the job's own fault, or PluginFault "invalid_result"."""
        request = MeasureRequest(tuple(dict.fromkeys(models)), self.dataset, split, rounds)
        job = (await self.children.submit(phase.replace(" ", "-"), "server/1.measure", request, self.settings.measure)).id

        async def seen(records: Mapping[str, JobRecord]) -> None:
            record = records[phase]
            note(record.progress.fraction, record.progress.message or record.why)

        ended = await self.children.ended({phase: job}, seen, begin_by=self.deadline, wait_s=self.settings.wait_s)
        record = ended[phase]
        if record.state == "cancelled" and job in self.children.waited:
            raise Unmeasured(self.children.waited[job])
        result = result_of(record, Measured)
        found = {m.model: m for m in result.measurements}
        if missing := [model for model in request.models if model not in found]:
            raise PluginFault("invalid_result", f"server/1.measure (job {job}) gave no figures for {missing[0]}")
        self.conditions = result.conditions
        return found
