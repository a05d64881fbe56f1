"""What trainers of text classifiers have in common, as pure functions: reading a dataset (data.py), scoring logits (trainer.py).

What is imported here is declared as the extra `kernelm-contracts[texts]`; pyarrow only where a dataset is read, so that a server
needs none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.data import DatasetCard
from kernelm_contracts.trainer import Scores, TrainRequest
from kernelm_sdk.errors import ClientFault

REMEDY = "prepare the dataset again with data/1"


class Documents(NamedTuple):
    """The documents of one split."""

    texts: list[str]
    labels: NDArray[np.int64]  # [documents], index into `Dataset.labels`


class Dataset(NamedTuple):
    """A dataset in memory."""

    card: DatasetCard
    splits: dict[str, Documents]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.card.labels

    @property
    def train(self) -> Documents:
        """The split to learn from: every label occurs in it."""
        return self.splits["train"]


def read_dataset(folder: Path, splits: Sequence[str] = ("train", "validation", "test")) -> Dataset:
    """The named splits of the dataset in `folder`, "train" among them. ClientFault "invalid_dataset" that names the file, for what
    is missing or broken, fewer than two labels, an empty split, labels out of range, and a label without training documents."""
    try:
        card = msgspec.json.decode((folder / "dataset.json").read_bytes(), type=DatasetCard)
    except (OSError, msgspec.DecodeError) as error:
        raise _invalid("dataset.json", _why(error, folder)) from None
    labels = card.labels
    if len(set(labels)) < max(len(labels), 2):
        raise _invalid("dataset.json", f"`labels` must be at least two different names, not {', '.join(labels) or 'none'}")
    dataset = Dataset(card, {split: _read_split(folder / f"{split}.parquet", len(labels)) for split in splits})
    if absent := set(range(len(labels))) - set(dataset.train.labels.tolist()):
        raise _invalid("train.parquet", f"no document of {', '.join(labels[k] for k in sorted(absent))}")
    return dataset


def _read_split(path: Path, labels: int) -> Documents:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=["text", "label"])
        documents = Documents(table["text"].to_pylist(), np.asarray(table["label"].to_pylist(), np.int64))
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, KeyError) as error:
        raise _invalid(path.name, _why(error, path.parent)) from None
    if not documents.texts or not all(isinstance(text, str) for text in documents.texts):
        raise _invalid(path.name, "column text: every split needs documents, and every document a text")
    if documents.labels.min() < 0 or documents.labels.max() >= labels:
        raise _invalid(path.name, f"column label: {documents.labels.min()} to {documents.labels.max()} of {labels} labels")
    return documents


def _why(error: Exception, folder: Path) -> str:
    """What a library says, without where the store keeps the files."""
    return str(error).partition("\n")[0].replace(f"{folder}/", "")


def _invalid(file: str, what: str) -> ClientFault:
    return ClientFault("invalid_dataset", f"dataset: {file}: {what}", REMEDY)


def check_private(request: TrainRequest, card: DatasetCard) -> str:
    """What speaks against training on this dataset for the sake of private data; "" for nothing, or if nobody asks.

    ClientFault "private_data" if the request refuses such a dataset. It rests on the dataset's card, so on what was looked for.
    """
    if request.require_private_clean == "off":
        return ""
    if card.private is None:
        problem = "nobody looked for private data in the dataset"
    elif card.private.left:
        problem = f"the dataset holds private data: {', '.join(f'{n} {kind}' for kind, n in card.private.left.items())}"
    else:
        return ""
    if request.require_private_clean == "refuse":
        raise ClientFault("private_data", f"train request: require_private_clean: {problem}",
                          'prepare it again with private = {action = "redact"}, or train with require_private_clean = "warn"')
    return problem


def score(split: str, labels: Sequence[str], truth: NDArray[np.int64], logits: NDArray[np.floating]) -> Scores:
    """Scores of `logits` [documents, labels] against `truth` [documents].

    Macro figures are means over the labels that occur in `truth`. A precision without predictions counts as 0.
    """
    predicted, rows = logits.argmax(axis=1), np.arange(len(truth))
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    right, support, found = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = right / np.maximum(found, 1), right / np.maximum(support, 1)
    f1, present = 2 * right / np.maximum(support + found, 1), support > 0
    per_label = {label: {"precision": float(precision[k]), "recall": float(recall[k]), "f1": float(f1[k]),
                         "support": float(support[k])} for k, label in enumerate(labels)}  # fmt: skip
    logs = log_softmax(logits.astype(np.float64))
    return Scores(split, len(truth), float(np.mean(predicted == truth)), float(recall[present].mean()), float(f1[present].mean()),
                  float(-np.mean(logs[rows, truth])), per_label, tuple(tuple(map(int, row)) for row in confusion))  # fmt: skip


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Natural logarithms of the probabilities, [documents, labels]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.floating] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
