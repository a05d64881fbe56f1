"""The process that holds one model while it is measured, and does what `measuring` asks for over a pipe."""

import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kernelm_contracts.energy import Meter
from kernelm_contracts.trainer import Scores
from kernelm_sdk.errors import ClientFault, Fault, PluginFault

if TYPE_CHECKING:
    from kernelm_encoder.model import Model

LATENCY_DOCUMENTS = 50  # a round: with 5 rounds the 99th percentile is that of 250


class Loaded(NamedTuple):
    size: int  # bytes of the artifact
    load_s: float  # with the import of its library and one answer
    memory_mb: float  # growth of the resident set by that


class Task(NamedTuple):
    name: Literal["speed", "scores"]
    round: int = 0


class Speed(NamedTuple):
    latencies_ms: list[float]  # one document each, from text to ranked labels
    throughput: float  # documents/s over the whole split, in batches
    energy_j: float  # a document of it; 0 where it can't be read


class Corpus(NamedTuple):
    """A split of a dataset; `truth` are indices into `labels`."""

    split: str
    labels: tuple[str, ...]
    texts: list[str]
    truth: list[int]


def main(connection: Connection, folder: Path, dataset: Path, split: str, labels: tuple[str, ...], threads: int,
         max_batch: int) -> None:  # fmt: skip
    """Load, say so, then answer tasks until the other side is gone. A fault is sent as its body, and ends the process."""
    try:
        model, loaded = _load(folder, threads)
        connection.send(loaded)
        examination = Examination(model, read_corpus(dataset, split, labels), max_batch)
        while True:
            task: Task = connection.recv()
            connection.send(examination.speed(task.round) if task.name == "speed" else examination.scores())
    except (EOFError, ConnectionError):
        return
    except Fault as fault:
        connection.send(fault.body())
    except Exception:
        connection.send(PluginFault("measure_failed", traceback.format_exc()).body())


def _load(folder: Path, threads: int) -> tuple["Model", Loaded]:
    import psutil

    from kernelm_encoder.model import open_model

    process = psutil.Process()
    before, started = process.memory_info().rss, perf_counter()
    model = open_model(folder, threads)
    load_s = perf_counter() - started
    return model, Loaded(model.size, load_s, (process.memory_info().rss - before) / 2**20)


class Examination:
    """A loaded model and the split on which it is measured."""

    def __init__(self, model: "Model", corpus: Corpus, max_batch: int) -> None:
        self._model, self._corpus, self._max_batch = model, corpus, max_batch
        self._logits: Any = None  # [documents, labels] in the dataset's order of labels, from the last `speed`

    def speed(self, turn: int) -> Speed:
        """One turn: documents one by one, then the split in batches."""
        return Speed(self._latencies(turn), *self._throughput())

    def _latencies(self, turn: int) -> list[float]:
        from kernelm_encoder.answers import rank

        texts = self._corpus.texts
        stride = max(1, len(texts) // LATENCY_DOCUMENTS)  # all over the split, in each round other documents
        latencies: list[float] = []
        for text in (texts[(turn + i * stride) % len(texts)] for i in range(min(LATENCY_DOCUMENTS, len(texts)))):
            started = perf_counter()
            rank(self._model.run([self._model.tokenize(text)]).logits, self._model.card.labels)
            latencies.append((perf_counter() - started) * 1e3)
        return latencies

    def _throughput(self) -> tuple[float, float]:
        """(documents/s, joules a document)"""
        import numpy as np

        model, texts, step = self._model, self._corpus.texts, self._max_batch
        meter, started = Meter(), perf_counter()
        logits = [model.run([model.tokenize(text) for text in texts[i : i + step]]).logits for i in range(0, len(texts), step)]
        throughput, energy_j = len(texts) / (perf_counter() - started), meter.joules() / len(texts)
        columns = [model.card.labels.index(label) for label in self._corpus.labels]
        self._logits = np.concatenate(logits)[:, columns]
        return throughput, energy_j

    def scores(self) -> Scores:
        """Quality by what the last `speed` predicted."""
        return score(self._corpus, self._logits)


def read_corpus(dataset: Path, split: str, labels: tuple[str, ...]) -> Corpus:
    """The columns `text` and `label` of `<split>.parquet`; ClientFault "invalid_dataset" that names what is wrong."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = dataset / f"{split}.parquet"
    try:
        table = pq.read_table(path, columns=["text", "label"])
        texts, truth = table["text"].to_pylist(), table["label"].to_pylist()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise _invalid_dataset(path, str(error)) from None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise _invalid_dataset(path, "`text` must be strings, at least one")
    if not all(isinstance(label, int) and 0 <= label < len(labels) for label in truth):
        raise _invalid_dataset(path, f"`label` must be 0 to {len(labels) - 1}, as labels.json has {len(labels)}")
    return Corpus(split, labels, texts, truth)


def _invalid_dataset(path: Path, why: str) -> ClientFault:
    return ClientFault("invalid_dataset", f"{path.name}: {why}", "measure on an artifact of kind 'dataset'")


def score(corpus: Corpus, logits: Any) -> Scores:
    """Quality of the logits [documents, labels]; means over labels count each label once, absent ones as 0."""
    import numpy as np
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    from kernelm_encoder.answers import log_softmax

    truth, columns = np.asarray(corpus.truth), list(range(len(corpus.labels)))
    predicted = logits.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(truth, predicted, labels=columns, zero_division=0)
    loss = -log_softmax(logits.astype(np.float64))[np.arange(len(truth)), truth].mean()
    per_label = {label: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]),
                         "support": float(support[i])} for i, label in enumerate(corpus.labels)}  # fmt: skip
    confusion = tuple(map(tuple, confusion_matrix(truth, predicted, labels=columns).tolist()))
    return Scores(corpus.split, len(truth), float(accuracy_score(truth, predicted)), float(recall.mean()),
                  float(f1.mean()), float(loss), per_label, confusion,
                  right=f"{int(''.join('01'[hit] for hit in (predicted == truth).astype(int)), 2):x}")  # fmt: skip
