"""`optimizer/1`: what it reports was measured, the winner is good enough, and the test split is looked at once, at the end.

The checks play the job table: trainings and measurements that the optimizer submits are answered here, with figures that are
another ones each time, so that it is known where each figure that it reports comes from.
"""

import importlib.util
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.driver import Attempt
from kernelm.testing.conformance.jobs import finished
from kernelm.testing.conformance.results import Failed, Skipped
from kernelm_contracts.conformance.trainer import LABELS, SIZES, write_dataset
from kernelm_contracts.jobs import JobName, JobRecord, JobSpec
from kernelm_contracts.optimizer import Optimized, OptimizeRequest, Row
from kernelm_contracts.server import Measured, Measurement, MeasureRequest
from kernelm_contracts.trainer import Scores, Trained, TrainRequest
from kernelm_sdk.errors import ClientFault, FaultBody

checks = Checks()
MODELS = ("older", "smaller", "trained")
BROKEN = "lbfgs"  # the algorithm whose training ends in a fault
NOT_MEASURED = "not measured"


class SearchTable:
    """`jobs/1` for an optimizer: each job is done at the second look at it."""

    def __init__(self) -> None:
        self.trained = ""  # digest of the model that every training gives
        self.jobs: dict[str, JobRecord] = {}
        self.given: list[tuple[str, tuple[Measurement, ...]]] = []  # (split, figures) of each measurement, in their order
        self._numbers = itertools.count(1)

    def submit(self, spec: JobSpec) -> JobRecord:
        record = JobRecord(f"child-{next(self._numbers)}", spec, "", "queued", submitted=1.0)
        try:
            if spec.uses == "trainer/1.train":
                record = self._train(record, msgspec.convert(spec.request, TrainRequest))
            elif spec.uses == "server/1.measure":
                record = self._measure(record, msgspec.convert(spec.request, MeasureRequest))
            else:
                raise ClientFault("not_found", f"nobody serves {spec.uses!r} here: trainer/1.train and server/1.measure are")
        except msgspec.ValidationError as error:
            raise ClientFault("invalid", f"{spec.uses}: {error}", "the request does not fit the contract") from None
        self.jobs[record.id] = record
        return msgspec.structs.replace(record, state="running", result={}, fault=None)

    def get(self, request: JobName) -> JobRecord:
        if request.id not in self.jobs:
            raise ClientFault("not_found", f"job {request.id!r} is not known")
        return self.jobs[request.id]

    def cancel(self, request: JobName) -> JobRecord:
        return self.get(request)

    def children(self, parent: str) -> list[JobRecord]:
        """What a job has submitted."""
        return [r for r in self.jobs.values() if r.spec.parent == parent]

    def _train(self, record: JobRecord, request: TrainRequest) -> JobRecord:
        if request.algorithm == BROKEN:
            fault = FaultBody("client", "invalid", f"algorithm {BROKEN!r} is not for this structure")
            return msgspec.structs.replace(record, state="dead", fault=fault)
        result = Trained(self.trained, request.structure, request.algorithm, 10, _scores("validation", 0.9), took_s=0.1)
        return msgspec.structs.replace(record, state="done", result=msgspec.to_builtins(result))

    def _measure(self, record: JobRecord, request: MeasureRequest) -> JobRecord:
        count = len(self.given) + 1
        found = tuple(Measurement(m, _scores(request.split, _accuracy(m)), 1.0 + count / 1000, 2.0, 100.0, 1000, 1.0, 0.1)
                      for m in request.models)  # fmt: skip
        self.given.append((request.split, found))
        return msgspec.structs.replace(record, state="done", result=msgspec.to_builtins(Measured(found)))


def _accuracy(model: str) -> float:
    """Another one for each model, and the same each time."""
    return round(0.5 + int(model[-4:], 16) / 2**17, 6)


def _scores(split: str, accuracy: float) -> Scores:
    return Scores(split, SIZES[split], accuracy, accuracy, accuracy, 0.3)


async def prepare(case: Case) -> None:
    """A dataset and models, where the author gives none, and the job table."""
    case.table = SearchTable()
    if not case.stand.has_store:
        return
    scratch = case.stand.system.home / "scratch"
    scratch.mkdir(exist_ok=True)
    for name in ("dataset", *MODELS):
        if name not in case.artifacts:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                kind = _write(name, Path(folder))
                case.artifacts[name] = await case.stand.store(Path(folder), kind)
    case.table.trained = case.artifacts["trained"]
    train = {"dataset": "@dataset", "structure": "tfidf-linear"}
    case.requests.setdefault("optimizer/1.optimize", {"dataset": "@dataset", "quantize": False, "candidates": [
        {"name": "older", "model": "@older"}, {"name": "smaller", "model": "@smaller"},
        {"name": "new", "train": {**train, "algorithm": "liblinear"}},
        {"name": "broken", "train": {**train, "algorithm": BROKEN}}]})  # fmt: skip


def _write(name: str, folder: Path) -> str:
    """A dataset, or what is known of a model without its weights; its kind."""
    if name == "dataset":
        if importlib.util.find_spec("pyarrow"):
            write_dataset(folder)
        else:
            splits = {split: {"documents": n, "tokens": 0} for split, n in SIZES.items()}
            card = {"name": "checked", "labels": LABELS, "steps": [], "splits": splits, "max_tokens": 256}
            (folder / "dataset.json").write_text(json.dumps(card))
        return "dataset"
    card = {"name": name, "task": "text-classification", "structure": "tfidf-linear", "labels": LABELS, "max_tokens": 0}
    (folder / "model.json").write_text(json.dumps(card))
    (folder / "evaluation.json").write_text("{}")
    return "model"


async def searched(case: Case, **changes: Any) -> tuple[Optimized, OptimizeRequest, Attempt]:
    """A search at its end."""
    request = case.sample("optimizer/1", "optimize")
    if request is None:
        raise Skipped("no dataset and models: the artifact store is not installed, and conformance.toml gives none")
    case.table.given.clear()
    attempt = await case.stand.driver.hand(case.main.wire, "optimizer/1", "optimize", {**request, **changes})
    await finished(attempt)
    if attempt.final is None or attempt.final.result is None:
        raise Failed("`optimize` ended without a result", attempt.text)
    try:
        result = msgspec.convert(attempt.final.result, Optimized)
    except msgspec.ValidationError as error:
        raise Failed(f"the result is no Optimized: {error}", attempt.text) from None
    return result, msgspec.convert({**request, **changes}, OptimizeRequest), attempt


def figures(case: Case, model: str, split: str = "validation") -> list[Measurement]:
    """All that it was given of a model."""
    return [m for given, measurements in case.table.given if given == split for m in measurements if m.model == model]


@checks.add(
    "optimizer.measured",
    "never reports a candidate that it did not measure: every figure is one that `server/1.measure` gave, on the validation split",
    "take figures from the measurement alone; a row without one says `not measured: <reason>`",
)
async def measured(case: Case) -> None:
    result, _, attempt = await searched(case)
    for row in result.rows:
        if row.measurement is not None and row.measurement not in figures(case, row.model):
            raise Failed(f"the figures of {row.name!r} are none that were measured of its model", attempt.text)
        if row.measurement is None and row.outcome in ("winner", "measured"):
            raise Failed(f"{row.name!r} is reported as {row.outcome!r}, without a measurement", attempt.text)


@checks.add(
    "optimizer.rows",
    "accounts for every candidate: one row each, and what has no figures says why",
    "a candidate whose training fails is a row with the outcome `not measured: <reason>`, and no end of the search",
)
async def rows(case: Case) -> None:
    result, request, attempt = await searched(case)
    named = [row.name for row in result.rows]
    for candidate in request.candidates:
        if named.count(candidate.name) != 1:
            raise Failed(f"candidate {candidate.name!r} has {named.count(candidate.name)} rows", attempt.text)
    for row in result.rows:
        if row.measurement is None and not (row.outcome.startswith(NOT_MEASURED) and len(row.outcome) > len(NOT_MEASURED) + 2):
            raise Failed(f"{row.name!r} has no figures, and its outcome {row.outcome!r} is not `not measured: <reason>`",
                         attempt.text)  # fmt: skip


@checks.add(
    "optimizer.winner",
    "chooses one winner among the rows, within `max_drop` of the best accuracy, whatever the objective",
    "compare on the validation split; `model` and `winner` are those of the row with the outcome `winner`",
)
async def winner(case: Case) -> None:
    for objective in ("accuracy", "latency", "size"):
        result, request, attempt = await searched(case, objective=objective)
        won = [row for row in result.rows if row.outcome == "winner"]
        if [(row.name, row.model) for row in won] != [(result.winner, result.model)]:
            raise Failed(f"{objective}: the rows name {[(r.name, r.model[:19]) for r in won]} as winners, and the result "
                         f"{result.winner!r}, {result.model[:19]}", attempt.text)  # fmt: skip
        best, mine = max(map(_measured_accuracy, result.rows)), _measured_accuracy(won[0])
        if mine < best - (request.max_drop if objective != "accuracy" else 0.0) - 1e-9:
            raise Failed(f"{objective}: the winner's accuracy is {mine:.4f}, and the best is {best:.4f}", attempt.text)


def _measured_accuracy(row: Row) -> float:
    return row.measurement.scores.accuracy if row.measurement else 0.0


@checks.add(
    "optimizer.test",
    "looks at the test split once, of the winner alone, after the choice, and trains without it",
    "MeasureRequest.split is `validation` in the search; TrainRequest.report_test is false",
)
async def test_split(case: Case) -> None:
    result, _, attempt = await searched(case)
    tests = [n for n, (split, _) in enumerate(case.table.given) if split == "test"]
    if len(tests) > 1 or any([m.model for m in case.table.given[n][1]] != [result.model] for n in tests):
        raise Failed(f"the test split was measured {len(tests)} times, or not of the winner alone", attempt.text)
    if tests and any(split == "validation" for split, _ in case.table.given[tests[0] :]):
        raise Failed("candidates were measured after the test split had been looked at", attempt.text)
    if result.test is not None and result.test not in [m.scores for m in figures(case, result.model, "test")]:
        raise Failed("`test` is not what was measured of the winner on the test split", attempt.text)
    for child in case.table.children(attempt.job):
        if child.spec.uses == "trainer/1.train" and msgspec.convert(child.spec.request, TrainRequest).report_test:
            raise Failed(f"{child.spec.name!r} is trained with report_test, which looks at the test split", attempt.text)


@checks.add(
    "optimizer.children",
    "submits its trainings and measurements as jobs of its own: with itself as `parent`, on the dataset of the request",
    "JobSpec.parent is the job's id: it is cancelled with it",
)
async def children(case: Case) -> None:
    before = set(case.table.jobs)
    _, request, attempt = await searched(case)
    mine = [r for name, r in case.table.jobs.items() if name not in before]
    if not mine:
        raise Failed("it submitted no job, and reports figures", attempt.text)
    for record in mine:
        if record.spec.parent != attempt.job:
            raise Failed(f"{record.spec.name!r} ({record.spec.uses}) has the parent {record.spec.parent!r}, and not "
                         f"{attempt.job!r}", attempt.text)  # fmt: skip
        if record.spec.request.get("dataset") != request.dataset:
            raise Failed(f"{record.spec.name!r} works on another dataset than the search", attempt.text)
