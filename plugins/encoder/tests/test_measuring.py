"""Measuring, with real processes and models."""

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from kernelm_contracts.server import MeasureRequest
from kernelm_encoder.measuring import check_request, measure
from kernelm_encoder.model import open_model
from kernelm_sdk.errors import ClientFault, PluginFault
from kernelm_sdk.plugin import JobCancelled


class Watcher:
    """Remembers what it is told; `then` runs at each step."""

    def __init__(self, then: Any = None) -> None:
        self.steps: list[tuple[float, str, str, dict[str, float]]] = []
        self.cancelled, self._then = False, then

    def progress(self, fraction: float, phase: str = "", message: str = "", **metrics: float) -> None:
        self.steps.append((fraction, phase, message, metrics))
        if self._then:
            self._then()
        self.raise_if_cancelled()

    def raise_if_cancelled(self) -> None:
        if self.cancelled:
            raise JobCancelled("no longer wanted")


def children() -> list[psutil.Process]:
    """Of this process, those that measure; another test may have left one that has ended."""
    living = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if "spawn_main" in " ".join(child.cmdline())]


def run(folders: list[Path], dataset: Path, watcher: Watcher, **fields: Any) -> Any:
    models = {f"sha256:{folder.name}": folder for folder in folders}
    return measure(MeasureRequest(tuple(models), "sha256:news", **fields), models, dataset, 16, watcher)


def test_models_are_measured_side_by_side(tfidf: Any, tfidf_int8: Path, onnx_int8: Path, dataset: Path, unseen: Any) -> None:
    watcher = Watcher()
    folders = [tfidf[0], tfidf_int8, onnx_int8]
    result = run(folders, dataset, watcher, rounds=2, threads=1)
    words, small, graph = result.measurements
    for measured, folder in zip(result.measurements, folders, strict=True):
        assert measured.model == f"sha256:{folder.name}"
        assert measured.bytes == sum(path.stat().st_size for path in folder.iterdir())
        assert 0 < measured.latency_ms <= measured.latency_p99_ms
        assert measured.throughput > 0
        assert measured.load_s > 0
        assert measured.memory_mb > 5
    _, vectorizer, classifier = tfidf
    assert words.scores.accuracy == pytest.approx(classifier.score(vectorizer.transform(unseen.texts), unseen.truth))
    assert words.scores.macro_recall == pytest.approx(words.scores.accuracy)  # 20 documents a label
    assert (words.scores.split, words.scores.documents) == ("validation", 100)
    assert list(words.scores.per_label) == ["tech", "sports", "politics", "entertainment", "business"]  # the dataset's
    assert [sum(row) for row in words.scores.confusion] == [20] * 5
    assert sum(words.scores.confusion[i][i] for i in range(5)) == round(100 * words.scores.accuracy)
    assert 0 < words.scores.loss < 1.6  # ln 5 is chance
    assert small.bytes < words.bytes
    assert graph.latency_ms > words.latency_ms
    assert result.conditions["threads"] == "1"
    assert result.conditions["processor"]

    fractions = [fraction for fraction, *_ in watcher.steps]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    turns = [message.split(":", 1)[1].strip() for _, phase, message, _ in watcher.steps if phase == "measuring"]
    names = [f"sha256:{folder.name}" for folder in folders]
    assert turns == [*names, *names[1:], names[0]]
    assert not children()


def test_a_cancelled_job_leaves_no_process(tfidf: Any, dataset: Path) -> None:
    def cancel() -> None:
        assert children()
        watcher.cancelled = True

    watcher = Watcher(cancel)
    with pytest.raises(JobCancelled):
        run([tfidf[0]], dataset, watcher)
    assert not children()


def test_a_process_that_dies_is_reported(tfidf: Any, dataset: Path) -> None:
    watcher = Watcher(lambda: [child.kill() for child in children()])
    with pytest.raises(PluginFault, match="exit code -9") as caught:
        run([tfidf[0]], dataset, watcher)
    assert caught.value.code == "measure_failed"


def test_labels_must_agree(tfidf: Any, dataset: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(dataset, tmp_path / "other"))
    (other / "labels.json").write_text(json.dumps(["spam", "ham"]))
    with pytest.raises(ClientFault) as caught:
        run([tfidf[0]], other, Watcher())
    assert caught.value.code == "labels_differ"
    assert all(name in caught.value.message for name in (f"sha256:{tfidf[0].name}", "sha256:news", "'business'", "'spam'"))


def test_bad_datasets_and_models_are_refused(tfidf: Any, dataset: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tfidf[0], tmp_path / "model"))
    (broken / "linear.safetensors").write_bytes(b"")
    for folder, data, fields, what in (
        (tfidf[0], dataset, {"split": "test"}, "test.parquet"),
        (tfidf[0], tmp_path, {}, "labels.json"),
        (broken, dataset, {}, "linear.safetensors"),
    ):
        with pytest.raises(ClientFault, match=what):
            run([folder], data, Watcher(), **fields)


def test_labels_outside_of_the_list_are_refused(tfidf: Any, dataset: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copy(dataset / "labels.json", tmp_path)
    table = pa.table({"text": ["a text"], "label": pa.array([5], pa.int32())})
    pq.write_table(table, tmp_path / "validation.parquet")
    with pytest.raises(ClientFault, match="`label` must be 0 to 4"):
        run([tfidf[0]], tmp_path, Watcher())


@pytest.mark.parametrize(("fields", "what"), [
    ({"models": ()}, "`models` is empty"), ({"models": ("a", "a")}, "twice"),
    ({"models": ("a",), "rounds": 0}, "`rounds`"), ({"models": ("a",), "threads": -1}, "`threads`"),
])  # fmt: skip
def test_bad_requests_are_refused(fields: Any, what: str) -> None:
    with pytest.raises(ClientFault, match=what):
        check_request(MeasureRequest(dataset="sha256:news", **fields))


def test_a_round_times_documents_from_all_over_the_split(tfidf: Any, dataset: Path) -> None:
    from kernelm_encoder.examinee import Examination, read_corpus

    labels = tuple(json.loads((dataset / "labels.json").read_text()))
    examination = Examination(open_model(tfidf[0]), read_corpus(dataset, "validation", labels), 16)
    speeds = [examination.speed(turn) for turn in range(2)]
    assert [len(speed.latencies_ms) for speed in speeds] == [50, 50]
    assert all(speed.throughput > 0 for speed in speeds)
