"""`trainer/1`: the same request gives the same model, also from a checkpoint; progress only grows; scores add up."""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from kernelm.testing.conformance.check import Case, Checks
from kernelm.testing.conformance.driver import Attempt
from kernelm.testing.conformance.results import Failed, Skipped
from kernelm_contracts.trainer import Scores, Trained
from kernelm_sdk.system import ArtifactName, Artifacts, OpenArtifact

checks = Checks()
LABELS = ("business", "sport")
SIZES = {"train": 60, "validation": 20, "test": 20}
WORDS = (("bank", "profit", "shares", "market", "merger"), ("goal", "striker", "match", "league", "coach"))


def write_dataset(folder: Path) -> None:
    """A dataset as kernelm_contracts/data.py describes it: two classes that words tell apart."""
    import pyarrow
    from pyarrow import parquet

    for split, count in SIZES.items():
        rows = [{"id": f"{split}/{n}", "label": n % 2, "text": f"The {WORDS[n % 2][n // 2 % 5]} and the {WORDS[n % 2][n % 5]} of "
                 f"{split} number{n} {'rose' if n % 3 else 'fell'}."} for n in range(count)]  # fmt: skip
        schema = pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.string()), ("label", pyarrow.int32())])
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / f"{split}.parquet")
    (folder / "labels.json").write_text(json.dumps(LABELS))
    splits = {name: {"documents": n, "tokens": 0} for name, n in SIZES.items()}
    card = {"name": "checked", "labels": LABELS, "steps": [], "splits": splits, "max_tokens": 256}
    (folder / "dataset.json").write_text(json.dumps(card))


async def prepare(case: Case) -> None:
    """A dataset, where the author gives none."""
    if "dataset" not in case.artifacts and case.stand.has_store and importlib.util.find_spec("pyarrow"):
        scratch = case.stand.system.home / "scratch"
        scratch.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            write_dataset(Path(folder))
            case.artifacts["dataset"] = await case.stand.store(Path(folder), "dataset")
    if "dataset" in case.artifacts:
        case.requests.setdefault("trainer/1.train", {"dataset": "@dataset", "structure": "tfidf-linear", "algorithm": "liblinear"})


async def trained(case: Case, checkpoint: str = "") -> tuple[Trained, Attempt]:
    """Train the sample."""
    from kernelm.testing.conformance.jobs import SAY_WHICH, finished

    request = case.sample("trainer/1", "train")
    if request is None:
        raise Skipped("no dataset: pyarrow or the artifact store is not installed, and conformance.toml gives none")
    attempt = await case.stand.driver.hand(case.main.wire, "trainer/1", "train", request, None, checkpoint)
    await finished(attempt)
    if attempt.final is None or attempt.final.result is None:
        raise Failed("`train` ended without a result", attempt.text, SAY_WHICH)
    return msgspec.convert(attempt.final.result, Trained), attempt


async def files(case: Case, digest: str) -> Path:
    """The folder of an artifact."""
    opened: OpenArtifact = await case.stand.bus().call(Artifacts.open, ArtifactName(digest), timeout_s=60.0)
    return Path(opened.path)


@checks.add(
    "trainer.resumed",
    "gives the same model again, and from each checkpoint of it",
    "a checkpoint holds all that the rest depends on: weights, optimizer, position in the data, random numbers",
)
async def resumed(case: Case) -> None:
    first, attempt = await trained(case)
    checkpoints = [r.checkpoint for _, r in attempt.reports if r.checkpoint]
    for checkpoint in ("", *checkpoints[:2]):
        again, other = await trained(case, checkpoint)
        if (again.validation, again.test) != (first.validation, first.test):
            raise Failed(f"{'resumed' if checkpoint else 'trained again'}: accuracy {again.validation.accuracy:.4f}, loss "
                         f"{again.validation.loss:.6f}; before {first.validation.accuracy:.4f}, {first.validation.loss:.6f}",
                         other.text)  # fmt: skip


@checks.add(
    "trainer.progress",
    "reports progress that only grows, and steps that only grow",
    "`fraction` and the metric `step` never go back within an attempt",
)
async def progress(case: Case) -> None:
    _, attempt = await trained(case)
    seen = [r.progress for _, r in attempt.reports if r.progress is not None]
    for what, values in (
        ("fraction", [p.fraction for p in seen]),
        ("step", [p.metrics["step"] for p in seen if "step" in p.metrics]),
    ):
        if values != sorted(values):
            raise Failed(f"{what} goes back: {values}", attempt.text)


@checks.add(
    "trainer.scores",
    "reports scores of the splits that it was given, which add up",
    "count every document of the split; accuracy is the diagonal of the confusion matrix over all of it",
)
async def scores(case: Case) -> None:
    result, attempt = await trained(case)
    for name, found in (("validation", result.validation), ("test", result.test)):
        if found is None:
            continue
        _check_scores(case, name, found, attempt)


def _check_scores(case: Case, name: str, found: Scores, attempt: Attempt) -> None:
    request, made = case.sample("trainer/1", "train"), "dataset" not in case.subject.samples.artifacts
    ours = made and request is not None and request["dataset"] == case.artifacts.get("dataset")
    if found.split != name or (ours and found.documents != SIZES[name]):
        raise Failed(f"scores of {found.documents} documents of {found.split!r}, and {name!r} has {SIZES[name]}", attempt.text)
    if not (0 <= found.accuracy <= 1 and 0 <= found.macro_f1 <= 1):
        raise Failed(f"accuracy {found.accuracy}, macro_f1 {found.macro_f1}", attempt.text)
    if found.confusion:
        right, count = sum(row[k] for k, row in enumerate(found.confusion)), sum(map(sum, found.confusion))
        if count != found.documents or abs(right / max(count, 1) - found.accuracy) > 1e-6:
            raise Failed(
                f"{name}: the confusion matrix has {right} of {count} right, and accuracy is {found.accuracy}", attempt.text
            )


@checks.add(
    "trainer.model",
    "stores a model with its card and its scores, and describes it so",
    "model.json (a ModelCard) and evaluation.json: kernelm_contracts/trainer.py",
)
async def model(case: Case) -> None:
    result, attempt = await trained(case)
    folder = await files(case, result.model)
    for name in ("model.json", "evaluation.json"):
        if not (folder / name).is_file():
            raise Failed(f"the model has no {name}", attempt.text)
    card: dict[str, Any] = json.loads((folder / "model.json").read_text())
    exchange = await case.call("trainer/1", "describe", {"digest": result.model})
    if exchange.fault is not None and exchange.fault.code == "unsupported_method":
        return
    if not exchange.answered or any(exchange.body.get(k) != card.get(k) for k in ("name", "structure", "labels")):
        raise Failed("`describe` does not give the card in model.json", exchange.text)
