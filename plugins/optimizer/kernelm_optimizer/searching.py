"""One search: train, measure, choose, quantize, test, report. Effects only; `choice.py` and `study.py` decide."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from kernelm_contracts.data import DatasetCard
from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.optimizer import (
    Candidate,
    CandidateMeasured,
    Optimized,
    OptimizeRequest,
    Row,
    Search,
    Trials,
    Verdict,
)
from kernelm_contracts.server import Measurement
from kernelm_contracts.trainer import Scores, Trained
from kernelm_optimizer.auto import DEFAULT, verdict
from kernelm_optimizer.children import ENDED, Children, Wait, result_of, together
from kernelm_optimizer.choice import Figures, excess, figures, front, rank, reason_against
from kernelm_optimizer.folder import read_card
from kernelm_optimizer.measuring import Measuring, Unmeasured
from kernelm_optimizer.plan import first_row, nothing_measured, variant_name
from kernelm_optimizer.quantize import quantize, why_not
from kernelm_optimizer.report import Findings, write
from kernelm_optimizer.settings import Settings
from kernelm_sdk.checkpoints import invalid_checkpoint
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.plugin import Job, Plugin

if TYPE_CHECKING:
    from kernelm_optimizer.study import Study

STATE = "search.json"  # in a checkpoint
NOT_MEASURED = "not measured: "
FORMAT = 2  # of checkpoints: raise it when `_State`, or the trials in it, change
SHOWN = 20  # trials whose reasons are listed when none came to an end
# where each phase ends, as a share of the job
TRAINED, MEASURED, QUANTIZED, COMPARED, TESTED = 0.6, 0.75, 0.83, 0.92, 0.98


class _State(Struct, frozen=True):
    """A search's checkpoint."""

    spent_s: float = 0.0  # by earlier attempts
    children: dict[str, str] = {}  # candidate -> job that trains it
    trials: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"[]"))  # of the search's study


class Searching:
    """One search: `await run()`."""

    def __init__(self, plugin: Plugin, request: OptimizeRequest, candidates: tuple[Candidate, ...], job: Job) -> None:
        self.settings: Settings = plugin.settings
        self.context, self.request, self.candidates, self.job = plugin.context, request, candidates, job
        self.children = Children(job, self.settings.poll_max_s, self.settings.patience_s)
        self.rows = {c.name: first_row(c) for c in candidates}
        self.begun = time.monotonic()
        self.state = _State()
        self.study: Study | None = None
        self.shares: dict[str, tuple[float, str]] = {}  # how far the candidates and the trials are
        self.submitted: dict[str, str] = {}  # candidate -> job
        self.saving = asyncio.Lock()
        self.late: set[str] = set()  # candidates that lacked time, and nothing else
        self.measuring = Measuring(self.children, self.settings, request.dataset, self.begun + request.budget_s)
        self.accuracies: dict[str, float] = {}  # of what was trained, by its training, on the validation split
        self.alone: dict[str, Measurement] = {}  # of trials that were measured, each by itself
        self.notes: list[str] = []
        self.compared: tuple[Measurement, Measurement] | None = None  # the winner and its int8 variant, side by side

    async def run(self) -> Optimized:
        labels = await self._labels()
        await self._restore()
        if self.request.search is not None:  # what is wrong with it is said before anything is started
            self.study = await self.job.in_thread(_study, self.request.search, self.request.dataset, bytes(self.state.trials))
        await self._train()
        for name in [name for name, row in self.rows.items() if row.model]:
            await self._read_card(name, labels)
        await self._measure_candidates()
        winner = await self._quantize(self._choose())
        self.rows[winner] = msgspec.structs.replace(self.rows[winner], outcome="winner")
        test, compared = await self._test(self.rows[winner].model)
        report = await self._report(winner, test, compared)
        return Optimized(model=self.rows[winner].model, winner=winner, rows=tuple(self.rows.values()), test=test,
                         report=report, took_s=self._spent(), trials=self._summary(), verdict=compared, notes=tuple(self.notes))

    def _summary(self) -> Trials | None:
        if self.study is None or self.request.search is None:
            return None
        count = Counter(trial.state for trial in self.study.trials)
        measured = {name: row.measurement for name, row in self.rows.items() if row.measurement}
        return Trials(count["done"], count["pruned"], count["failed"], count["late"],
                      front(measured, self.request.search.objectives))  # fmt: skip

    # ---- the dataset, and what earlier attempts did --------------------------------------------------------------

    async def _labels(self) -> tuple[str, ...]:
        path = await self.context.artifact(self.request.dataset) / "dataset.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=DatasetCard).labels
        except (OSError, msgspec.MsgspecError) as error:
            raise ClientFault("invalid", f"dataset {self.request.dataset}: {path.name}: {error}",
                              "give the digest that `data/1.prepare` returned") from None

    async def _restore(self) -> None:
        if folder := await self.job.resume(FORMAT):
            try:
                self.state = msgspec.json.decode((folder / STATE).read_bytes(), type=_State)
            except (OSError, msgspec.DecodeError) as error:
                raise invalid_checkpoint(STATE, error) from None
            self.submitted = self.state.children
            self.measuring.deadline -= self.state.spent_s

    async def _save(self) -> None:
        async with self.saving:
            folder = self.job.scratch / "checkpoint"
            folder.mkdir(exist_ok=True)
            trials = msgspec.Raw(msgspec.json.encode(self.study.trials if self.study else []))
            (folder / STATE).write_bytes(msgspec.json.encode(_State(self._spent(), self.submitted, trials)))
            await self.job.save(folder, format=FORMAT, passing=True)

    def _spent(self) -> float:
        """Seconds that this search has taken so far, in all attempts."""
        return self.state.spent_s + time.monotonic() - self.begun

    # ---- training ------------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        """Candidates and trials, side by side."""
        self.job.progress(0.0, "training", "submitting candidates")
        deadline = self.measuring.deadline
        await together(self._train_candidates(deadline), self._search(deadline))

    async def _train_candidates(self, deadline: float) -> None:
        self.submitted = await self._submit([c for c in self.candidates if not c.model], deadline)
        if not self.submitted:
            return
        await self._save()
        ended = 0

        async def seen(records: Mapping[str, JobRecord]) -> None:
            nonlocal ended
            done = sum(r.state in ENDED for r in records.values())
            share = sum(1.0 if r.state in ENDED else r.progress.fraction for r in records.values()) / len(records)
            self._note("candidates", share, f"{done} of {len(records)} ended; " + "; ".join(
                f"{name}: {r.progress.phase or r.state} {100 * r.progress.fraction:.0f} %"
                for name, r in records.items() if r.state not in ENDED))
            if done != ended:
                ended = done
                await self._save()

        for name, record in (await self.children.ended(self.submitted, seen, deadline)).items():
            self._take(name, record)

    async def _search(self, deadline: float) -> None:
        """The trials; the best of them become rows, as candidates with a model do."""
        if self.request.search is None or self.study is None:
            return
        from kernelm_optimizer.trials import Trials as Running

        study = self.study
        await Running(study, self.request, self.children, self.settings, deadline, self._save,
                      lambda share, text: self._note("trials", share, text)).run()
        for trial in study.best(self.request.search.finalists):
            train = study.request(trial)
            self.rows[trial.name] = Row(trial.name, "", train.structure, train.algorithm, model=trial.model)
            self.alone |= {trial.name: trial.measurement} if trial.measurement else {}
            figures_of = dict(zip(self.request.search.objectives, trial.values, strict=True))
            self.accuracies |= {trial.name: figures_of["accuracy"]} if "accuracy" in figures_of else {}
        if not any(trial.state == "done" for trial in study.trials):
            for trial in study.trials[:SHOWN]:
                self.rows[trial.name] = Row(trial.name, NOT_MEASURED + trial.why)
                self.late |= {trial.name} if trial.state == "late" else set()

    def _note(self, what: str, share: float, text: str) -> None:
        self.shares[what] = share, text
        done = sum(s for s, _ in self.shares.values()) / len(self.shares)
        self.job.progress(TRAINED * done, "training", "; ".join(text for _, text in self.shares.values()))

    async def _submit(self, candidates: list[Candidate], deadline: float) -> dict[str, str]:
        """Candidate -> job. Those that an earlier attempt submitted are looked up; a new one needs budget."""
        children: dict[str, str] = {}
        for candidate in candidates:
            known = self.state.children.get(candidate.name, "")
            record = await self.children.find(known) if known else None
            if record and (record.state != "cancelled" or time.monotonic() >= deadline):
                children[candidate.name] = record.id
                continue
            if time.monotonic() >= deadline:
                self._reject_late(candidate.name, "before it could start")
                continue
            assert candidate.train is not None  # `checked` saw to it
            try:
                record = await self.children.submit(
                    f"train-{candidate.name}", "trainer/1.train", candidate.train, self.settings.train)
                children[candidate.name] = record.id
            except KernelFault:  # nobody's fault in particular: the whole search is tried again
                raise
            except Fault as fault:
                self._reject(candidate.name, fault.message)
        return children

    def _take(self, name: str, record: JobRecord) -> None:
        if record.state == "done":
            try:
                trained = result_of(record, Trained)
                self.rows[name] = msgspec.structs.replace(self.rows[name], model=trained.model)
                self.accuracies[name] = trained.validation.accuracy
            except Fault as fault:
                self._reject(name, fault.message)
        elif record.state == "dead":
            self._reject(name, record.fault.message if record.fault else record.why or "its job died without a reason")
        elif self._spent() >= self.request.budget_s:
            wait = self.children.waited.get(record.id, Wait(record.why)).text
            done = f"with {100 * record.progress.fraction:.0f} % of its training done"
            self._reject_late(name, done if record.started else f"before it began: {wait}")
        else:
            self._reject(name, f"its job was cancelled: {record.why or 'no reason given'}")

    def _reject(self, name: str, reason: str) -> None:
        self.rows[name] = msgspec.structs.replace(self.rows[name], outcome=NOT_MEASURED + reason)
        self.context.log.warning("%s: candidate %s is not measured: %s", self.job.id, name, reason)

    def _reject_late(self, name: str, how_far: str) -> None:
        self.late.add(name)
        self._reject(name, f"the budget of {self.request.budget_s:g} s was spent {how_far}")

    # ---- measuring and choosing ----------------------------------------------------------------------------------

    async def _read_card(self, name: str, labels: tuple[str, ...]) -> None:
        row = self.rows[name]
        try:
            card = read_card(await self.context.artifact(row.model))
        except ClientFault as fault:
            self._reject(name, fault.message)
            return
        self.rows[name] = msgspec.structs.replace(
            row, structure=card.structure, algorithm=card.algorithm, precision=card.precision)
        if card.labels != labels:
            self._reject(name, f"its labels are {', '.join(card.labels)}, the dataset's are {', '.join(labels)}")

    async def _measure_candidates(self) -> None:
        names = [name for name, row in self.rows.items() if row.model and not row.outcome]
        if not names:
            reasons = {name: row.outcome.removeprefix(NOT_MEASURED) for name, row in self.rows.items()}
            raise nothing_measured(reasons, self.late, self.request.budget_s)
        try:
            measured = await self._measure("measuring", [self.rows[name].model for name in names], (TRAINED, MEASURED))
        except Unmeasured as unmeasured:
            await self._without_a_comparison(names, unmeasured)
            return
        for name in names:
            await self._record(name, measured[self.rows[name].model])

    async def _without_a_comparison(self, names: list[str], unmeasured: Unmeasured) -> None:
        """What trials measured by themselves stands; without any, ClientFault `budget_too_small` that names the best one."""
        for name in names:
            self._reject(name, str(unmeasured))
        if not (figured := [name for name in names if name in self.alone]):
            best = max(names, key=lambda name: self.accuracies.get(name, -1.0))
            figure = f", accuracy {self.accuracies[best]:.4f} by its training" if best in self.accuracies else ""
            raise unmeasured.fault(f"no candidate was measured within budget_s = {self.request.budget_s:g}: {unmeasured}; "
                                   f"the best so far is {best!r} ({self.rows[best].model}{figure})")
        for name in figured:
            await self._record(name, self.alone[name])
        self.notes.append(f"what is measured was measured trial by trial, and not side by side: {unmeasured}")

    async def _measure(self, phase: str, models: list[str], share: tuple[float, float],
                       split: Literal["validation", "test"] = "validation") -> dict[str, Measurement]:  # fmt: skip
        """As of `Measuring.run`, in that `share` of the job."""
        rounds = self.settings.rounds if split == "validation" else 1  # of the test split only the scores are wanted
        return await self.measuring.run(phase, models, rounds, lambda done, text: self.job.progress(
            share[0] + (share[1] - share[0]) * done, phase, text), split)  # fmt: skip

    async def _record(self, name: str, measurement: Measurement) -> None:
        self.rows[name] = msgspec.structs.replace(self.rows[name], outcome="measured", measurement=measurement)
        if over := [f"{limit} by {by:.4g}" for limit, by in excess(self.request, measurement).items() if by > 0]:
            self.rows[name] = msgspec.structs.replace(self.rows[name], outcome=f"measured; above {' and '.join(over)}")
        await self.context.publish(CandidateMeasured(
            job=self.job.id, name=name, accuracy=measurement.scores.accuracy, latency_ms=measurement.latency_ms))

    def _figures(self) -> tuple[Figures, ...]:
        return tuple(figures(name, row.measurement, self.request) for name, row in self.rows.items() if row.measurement)

    def _choose(self) -> str:
        return rank(self._figures(), self.request.objective, self.request.max_drop)[0].name

    # ---- int8 ----------------------------------------------------------------------------------------------------

    async def _quantize(self, winner: str) -> str:
        """The name of the final winner: `winner`, or its int8 variant if that is kept."""
        if not self.request.quantize:
            return winner
        original = self.rows[winner]
        name = variant_name(winner, set(self.rows))
        self.rows[name] = Row(name, "", original.structure, original.algorithm, "int8")
        source = await self.context.artifact(original.model)
        if reason := why_not(read_card(source)):
            self._reject(name, reason)
            return winner
        best = max(f.accuracy for f in self._figures())
        model = await self._make_int8(name, source, original.model)
        if not model:
            return winner
        self.rows[name] = msgspec.structs.replace(self.rows[name], model=model)
        try:
            measured = await self._measure("measuring int8", [original.model, model], (QUANTIZED, COMPARED))
        except Unmeasured as unmeasured:
            self._reject(name, str(unmeasured))
            return winner
        self.compared = measured[original.model], measured[model]
        await self._record(name, measured[model])
        against = reason_against(figures(name, measured[model]), figures(winner, measured[original.model]), best,
                                 self.request.objective, self.request.max_drop)
        if against:
            self.rows[name] = msgspec.structs.replace(self.rows[name], outcome=f"not kept: {against}")
            return winner
        return name

    async def _make_int8(self, name: str, source: Path, original: str) -> str:
        """Digest of the int8 variant; "" (and a row that says why) if it could not be made."""
        self.job.progress(MEASURED, "quantizing", f"exporting {name}")
        target = self.job.scratch / "int8"
        try:
            made = await self.job.in_thread(quantize, source, target, self.settings.reduce_range)
        except Exception as error:  # torch and onnxruntime raise all kinds; the search has a winner without int8
            self.context.log.exception("%s: %s can't be made", self.job.id, name)
            self._reject(name, error.message if isinstance(error, Fault) else f"{type(error).__name__}: {error}")
            return ""
        self.context.log.info("%s: %s made in %.1f s, %d of %d bytes", self.job.id, name,
                              made.export_s + made.quantize_s, made.bytes_after, made.bytes_before)
        self.job.progress(QUANTIZED, "quantizing", f"storing {name}")
        metadata: dict[str, Any] = msgspec.to_builtins(made.card)
        return await self.context.store(target, "model", metadata=metadata, job=self.job.id, model=original,
                                        dataset=self.request.dataset)

    # ---- the end -------------------------------------------------------------------------------------------------

    async def _test(self, model: str) -> tuple[Scores | None, Verdict | None]:
        """The winner's scores on the test split, unless that could not begin; of "auto" also whether it beats the default there."""
        default = self.rows[DEFAULT].model if self.request.optimize == "auto" and self.rows[DEFAULT].measurement else model
        try:
            measured = await self._measure("testing the winner", [model, default], (COMPARED, TESTED), "test")
        except Unmeasured as unmeasured:
            self.notes.append(f"the winner is not tested: {unmeasured}")
            return None, None
        scores = measured[model].scores
        return scores, verdict(DEFAULT, scores, measured[default].scores) if self.request.optimize == "auto" else None

    async def _report(self, winner: str, test: Scores | None, compared: Verdict | None) -> str:
        self.job.progress(TESTED, "reporting")
        before, after = self.compared or (None, None)
        model = self.rows[winner].model
        findings = Findings(
            name=self.job.name or self.job.id, dataset=self.request.dataset, winner=winner, model=model,
            objective=self.request.objective, max_drop=self.request.max_drop, budget_s=self.request.budget_s,
            took_s=self._spent(), rows=tuple(self.rows.values()), test=test, int8_reference=before, int8=after,
            conditions=self.measuring.conditions, notes=tuple(self.notes),
            objectives=self.request.search.objectives if self.request.search else (),
            verdict=compared.text if compared else "", front=summary.front if (summary := self._summary()) else ())
        folder = self.job.scratch / "report"
        await self.job.in_thread(write, findings, folder, tuple(self.study.trials) if self.study else ())
        return await self.context.store(folder, "report", metadata={"name": findings.name, "winner": winner},
                                        job=self.job.id, model=model, dataset=self.request.dataset)


def _study(search: Search, dataset: str, trials: bytes) -> "Study":
    from kernelm_optimizer.study import Study, decoded  # Optuna takes its time, and not every search needs it

    return Study(search, dataset, decoded(trials))
