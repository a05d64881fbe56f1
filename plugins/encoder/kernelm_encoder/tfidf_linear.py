"""A linear classifier on TF-IDF, in NumPy: as kernelm_contracts.trainer defines it, and as scikit-learn's
`TfidfVectorizer(sublinear_tf=True)` computes it, but without loading scikit-learn and SciPy (README.md has figures).
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.terms import VIEWS, terms, tokenize
from kernelm_contracts.trainer import ModelCard
from kernelm_encoder.model import UNREADABLE, Array, Document, Output, invalid_model, read_tensors, size_of


class Terms(NamedTuple):
    """The known terms of a text: columns of the vocabulary and their TF-IDF, of unit length."""

    columns: NDArray[np.int64]
    values: Array


class TfidfLinear:
    """logits = weight @ x + bias. int8 weights stay int8 in memory: only the rows of a text's terms are widened."""

    embeds, extracts = False, False

    def __init__(self, card: ModelCard, size: int, vocabulary: dict[str, int], tensors: dict[str, NDArray[Any]]) -> None:
        self.card, self.size = card, size
        self._ngrams: int = card.request["ngrams"]
        self._views: tuple[str, ...] = tuple(card.request.get("views", ("words",)))
        self._column, self._idf = vocabulary.get, tensors["idf"]
        self._weight = np.ascontiguousarray(tensors["weight"].T)  # [terms, labels]: a term's weights lie together
        self._scale = tensors.get("scale", np.ones(len(card.labels), np.float32))
        self._bias = tensors["bias"]

    @classmethod
    def load(cls, folder: Path, card: ModelCard, threads: int) -> Self:
        """See `Model.load`. It computes on one thread."""
        ngrams = card.request.get("ngrams")
        if not isinstance(ngrams, int) or ngrams < 1:
            raise invalid_model(folder / "model.json", f"`request.ngrams` must be a number from 1, not {ngrams!r}")
        if not (views := card.request.get("views", ("words",))) or not set(views) <= VIEWS.keys():
            raise invalid_model(folder / "model.json", f"`request.views` must be of {', '.join(VIEWS)}, not {views!r}")
        vocabulary = _read_vocabulary(folder / "vocabulary.json")
        labels, terms = len(card.labels), len(vocabulary)
        shapes: dict[str, tuple[int | None, ...]] = {"idf": (terms,), "weight": (labels, terms), "bias": (labels,)}
        if card.precision == "int8":
            shapes["scale"] = (labels,)
        path = folder / "linear.safetensors"
        tensors = read_tensors(path, shapes)
        if (tensors["weight"].dtype == np.int8) != (card.precision == "int8"):
            raise invalid_model(path, f"`weight` is {tensors['weight'].dtype}, but model.json says {card.precision}")
        return cls(card, size_of(folder), vocabulary, tensors)

    def tokenize(self, text: str) -> Document:
        """See `Model.tokenize`. Tokens are words; this structure has no limit to them."""
        tokens = tokenize(text)
        views = [self._terms(view) for view in terms(text, self._views, self._ngrams, tokens)]
        columns, values = (np.concatenate(parts) for parts in zip(*views, strict=True))
        return Document(len(tokens), Terms(columns, values / np.float32(math.sqrt(len(views)))))

    def _terms(self, found: Sequence[str]) -> Terms:
        """The known ones of a view's terms."""
        counts = Counter(column for column in map(self._column, found) if column is not None)
        columns = np.fromiter(counts.keys(), np.int64, len(counts))
        values = (1 + np.log(np.fromiter(counts.values(), np.float32, len(counts)))) * self._idf[columns]
        norm = np.sqrt(values @ values)
        return Terms(columns, values / norm if norm else values)

    def run(self, documents: Sequence[Document]) -> Output:
        """See `Model.run`. A text without a known term gets the bias."""
        rows = [terms.values @ self._weight[terms.columns] for terms in (document.features for document in documents)]
        return Output(np.stack(rows) * self._scale + self._bias, None)


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    except UNREADABLE as error:
        raise invalid_model(path, str(error)) from None
    if not vocabulary or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise invalid_model(path, f"columns must be 0 to {len(vocabulary) - 1}, each once")
    return vocabulary
