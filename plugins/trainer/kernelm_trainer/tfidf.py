"""TF-IDF with a linear classifier: seconds to train, and hard to beat on topics.

From text to logits: see "tfidf-linear" in `kernelm_contracts.trainer`. idf = ln((1 + n) / (1 + df)) + 1, with n the
documents of the train split and df those with the term (scikit-learn's smooth idf). Terms in a single document of the
train split are left out: they say nothing about another one, and are most of the vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.feature_extraction.text import TfidfVectorizer

from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer import linear
from kernelm_trainer.corpus import Corpus, Documents
from kernelm_trainer.linear import Linear

TOKEN = r"(?u)\b\w\w+\b"


@dataclass(frozen=True)
class TfidfLinear:
    vectorizer: TfidfVectorizer
    classifier: Linear

    @property
    def parameters(self) -> int:
        return self.classifier.weight.size + self.classifier.bias.size

    def logits(self, documents: Documents) -> NDArray[np.float32]:
        """[documents, labels]"""
        return self.classifier.logits(self.vectorizer.transform(documents.texts))

    def write(self, folder: Path) -> None:
        """Write vocabulary and tensors to `folder` as `trainer/1` says."""
        vocabulary = {term: int(column) for term, column in sorted(self.vectorizer.vocabulary_.items())}
        (folder / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        tensors = {"idf": self.vectorizer.idf_, "weight": self.classifier.weight, "bias": self.classifier.bias}
        # save_file writes the memory as it lies, and scikit-learn's arrays may lie in Fortran order
        whole = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
        save_file(whole, folder / "linear.safetensors")


def fit(request: TrainRequest, corpus: Corpus, step_done: Callable[[int, int], None]) -> TfidfLinear:
    """Learn vocabulary and classifier from the train split. `step_done(done, of)` is told the fits."""
    train = corpus.splits["train"]
    vectorizer = TfidfVectorizer(lowercase=True, token_pattern=TOKEN, ngram_range=(1, request.ngrams), min_df=2,
                                 sublinear_tf=True, norm="l2", dtype=np.float32)  # fmt: skip
    try:
        x = vectorizer.fit_transform(train.texts)
    except ValueError as error:  # no term is left
        raise ClientFault("invalid_dataset", f"dataset: train.parquet column text: {error}", "give longer texts") from None
    classifier = linear.fit(x, train.labels, corpus.labels, request.algorithm, request.regularization, request.seed, step_done)
    return TfidfLinear(vectorizer, classifier)
