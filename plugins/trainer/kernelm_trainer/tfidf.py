"""TF-IDF with a linear classifier: seconds to train, and hard to beat on topics.

From text to logits: see "tfidf-linear" in `kernelm_contracts.trainer`. idf = ln((1 + n) / (1 + df)) + 1, with n the
documents of the train split and df those with the term (scikit-learn's smooth idf). Terms in a single document of the
train split are left out: they say nothing about another one, and are most of the vocabulary.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from kernelm_contracts.terms import VIEWS
from kernelm_contracts.trainer import TrainRequest
from kernelm_sdk.errors import ClientFault
from kernelm_trainer import linear
from kernelm_trainer.corpus import Corpus, Documents
from kernelm_trainer.linear import Linear


@dataclass(frozen=True)
class TfidfLinear:
    views: dict[str, TfidfVectorizer]
    classifier: Linear

    @property
    def parameters(self) -> int:
        return self.classifier.weight.size + self.classifier.bias.size

    def logits(self, documents: Documents) -> NDArray[np.float32]:
        """[documents, labels]"""
        return self.classifier.logits(_side_by_side([v.transform(documents.texts) for v in self.views.values()]))

    def write(self, folder: Path) -> None:
        """Write vocabulary and tensors to `folder` as `trainer/1` says."""
        vocabulary: dict[str, int] = {}
        for view, vectorizer in self.views.items():
            prefix, before = f"{view}:" if len(self.views) > 1 else "", len(vocabulary)
            vocabulary |= {prefix + term: before + int(column) for term, column in sorted(vectorizer.vocabulary_.items())}
        (folder / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        idf = np.concatenate([vectorizer.idf_ for vectorizer in self.views.values()])
        tensors = {"idf": idf, "weight": self.classifier.weight, "bias": self.classifier.bias}
        # save_file writes the memory as it lies, and scikit-learn's arrays may lie in Fortran order
        whole = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
        save_file(whole, folder / "linear.safetensors")


def fit(request: TrainRequest, corpus: Corpus, step_done: Callable[[int, int], None]) -> TfidfLinear:
    """Learn vocabulary and classifier from the train split. `step_done(done, of)` is told the fits."""
    train = corpus.splits["train"]
    views = {view: TfidfVectorizer(analyzer=partial(VIEWS[view], ngrams=request.ngrams), min_df=2, max_df=request.max_share,
                                   sublinear_tf=True, norm="l2", dtype=np.float32) for view in request.views}  # fmt: skip
    try:
        x = _side_by_side([vectorizer.fit_transform(train.texts) for vectorizer in views.values()])
    except ValueError as error:  # no term is left
        raise ClientFault("invalid_dataset", f"dataset: train.parquet column text: {error}",
                          "give longer texts, fewer views, or a higher max_share") from None  # fmt: skip
    classifier = linear.fit(x, train.labels, corpus.labels, request.algorithm, request.regularization, request.seed, step_done)
    return TfidfLinear(views, classifier)


def _side_by_side(blocks: Sequence[Any]) -> Any:
    """The blocks of all views, so that a row has length 1 again."""
    return sparse.hstack(blocks, "csr") / np.float32(math.sqrt(len(blocks))) if len(blocks) > 1 else blocks[0]
