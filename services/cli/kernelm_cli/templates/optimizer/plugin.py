"""Trains the candidates that are not yet trained, measures all of them side by side, and picks the most accurate one."""

import asyncio
import time

from msgspec import Struct, convert, structs, to_builtins

from kernelm_contracts.jobs import JobName, Jobs, JobSpec
from kernelm_contracts.optimizer import Candidate, CandidateMeasured, Optimized, Optimizer, OptimizeRequest, Row
from kernelm_contracts.server import Measured, Measurement, MeasureRequest
from kernelm_contracts.trainer import Trained
from kernelm_sdk.errors import ClientFault, Fault, PluginFault, from_body
from kernelm_sdk.plugin import Job, Plugin
from kernelm_sdk.system import Resources


class MostAccurate(Plugin, Optimizer):
    async def optimize(self, request: OptimizeRequest, job: Job) -> Optimized:
        began, rows = time.monotonic(), {c.name: Row(c.name, "not measured: the budget was spent") for c in request.candidates}
        for n, candidate in enumerate(request.candidates):
            job.progress(0.5 * n / len(rows), "training", candidate.name)
            if candidate.model or time.monotonic() - began < request.budget_s:
                rows[candidate.name] = await self.trained(candidate, request, job)
        if not (models := {r.model: name for name, r in rows.items() if r.model}):
            raise PluginFault("nothing_measured", "; ".join(f"{r.name}: {r.outcome}" for r in rows.values()), "correct them")
        for found in await self.measured(tuple(models), request.dataset, "validation", job):
            row = rows[models[found.model]]
            rows[row.name] = structs.replace(row, outcome="measured", measurement=found)
            await self.context.publish(CandidateMeasured(job=job.id, name=row.name, accuracy=found.scores.accuracy,
                                                         latency_ms=found.latency_ms))  # fmt: skip
        best = max((r for r in rows.values() if r.measurement), key=lambda r: (r.measurement.scores.accuracy, r.name))
        rows[best.name] = structs.replace(best, outcome="winner")
        (test,) = await self.measured((best.model,), request.dataset, "test", job)  # looked at once, after the choice
        return Optimized(best.model, best.name, tuple(rows.values()), test.scores, took_s=round(time.monotonic() - began, 3))

    async def trained(self, candidate: Candidate, request: OptimizeRequest, job: Job) -> Row:
        """Its row, with a model, or with the reason why there is none."""
        model = candidate.model
        if not model and candidate.train is None:
            raise ClientFault("invalid", f"candidate {candidate.name!r} has neither `model` nor `train`", "give one of them")
        if not model:
            train = structs.replace(candidate.train, dataset=request.dataset, report_test=False)
            try:
                model = convert(await self.done(f"train-{candidate.name}", "trainer/1.train", train, job), Trained).model
            except Fault as fault:
                return Row(candidate.name, f"not measured: {fault.message}")
        return Row(candidate.name, "", model=model)

    async def measured(self, models: tuple[str, ...], dataset: str, split: str, job: Job) -> tuple[Measurement, ...]:
        job.progress(0.8 if split == "test" else 0.5, f"measuring on {split}")
        result = await self.done(f"measure-{split}", "server/1.measure", MeasureRequest(models, dataset, split), job)
        return convert(result, Measured).measurements

    async def done(self, name: str, uses: str, request: Struct, job: Job) -> dict:
        """The result of a job of its own, which is cancelled with this one."""
        spec = JobSpec(name, uses, to_builtins(request), Resources(2.0, 2000), parent=job.id, run=job.run_id)
        record = await self.context.call(Jobs.submit, spec)
        while record.state not in ("done", "dead", "cancelled"):
            await asyncio.sleep(0.2)
            record = await self.context.call(Jobs.get, JobName(record.id))
        if record.state != "done":
            raise from_body(record.fault) if record.fault else PluginFault("job_failed", f"{name} is {record.state}: {record.why}")
        return record.result
