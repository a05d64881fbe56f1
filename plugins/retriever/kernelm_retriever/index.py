"""An index: written, read, and searched exactly. No bus."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kernelm_contracts.retriever import IndexCard, Source
from kernelm_retriever.passages import Passage
from kernelm_sdk.errors import ClientFault

Array = NDArray[np.float32]
CARD, PASSAGES, VECTORS = "index.json", "passages.parquet", "vectors.safetensors"
COLUMNS = ("document", "title", "passage", "label")
TOLERANCE = 1e-3  # of a vector's length


def write(folder: Path, card: IndexCard, passages: Sequence[Passage], vectors: Array) -> None:
    """The files of an index."""
    columns = {name: [getattr(p, name) for p in passages] for name in COLUMNS}
    pq.write_table(pa.table(columns, pa.schema([(name, pa.string()) for name in COLUMNS])), folder / PASSAGES, compression="zstd")
    save_file({"vectors": vectors}, folder / VECTORS)
    (folder / CARD).write_bytes(msgspec.json.format(msgspec.json.encode(card)))


def unit(vectors: Array) -> Array:
    """Each row divided by its Euclidean norm; a row of zeros stays."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Array = (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
    return scaled


class Index:
    """A loaded index. Its methods may be called from several threads at once."""

    def __init__(self, card: IndexCard, table: pa.Table, vectors: Array) -> None:
        self.card, self.vectors, self._table = card, vectors, table
        owners = table.column("document").to_pylist()
        self._starts = [k for k, owner in enumerate(owners) if not k or owner != owners[k - 1]]  # row of each first passage
        self._rows = {owners[start]: k for k, start in enumerate(self._starts)}  # document -> its number
        self._documents = unit(np.add.reduceat(vectors, self._starts))  # the direction of all of a document's passages

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The index in `folder`; ClientFault "invalid_index" that names the file if it is none."""
        name = CARD
        try:
            card = msgspec.json.decode((folder / CARD).read_bytes(), type=IndexCard)
            name = PASSAGES
            table = pq.read_table(folder / PASSAGES, columns=list(COLUMNS))
            name = VECTORS
            vectors = load_file(folder / VECTORS)["vectors"]
        except (OSError, msgspec.DecodeError, pa.ArrowException, SafetensorError, KeyError) as error:
            raise _invalid(name, f"{type(error).__name__}: {error}") from None
        shape = (card.passages, card.dimensions)
        if vectors.shape != shape or vectors.dtype != np.float32 or not len(vectors):
            raise _invalid(VECTORS, f"{vectors.dtype} {list(vectors.shape)}, and the card says float32 {list(shape)}")
        if table.num_rows != card.passages:
            raise _invalid(PASSAGES, f"{table.num_rows} rows, and the card says {card.passages}")
        if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=TOLERANCE):
            raise _invalid(VECTORS, "not all rows are of unit length")
        return cls(card, table, vectors)

    def search(self, vector: Array, top: int) -> tuple[Source, ...]:
        """The passages whose vectors have the highest cosine with `vector`, best first."""
        return self._sources(*_best(self.vectors @ vector, top))

    def recommend(self, documents: Sequence[str], vector: Array | None, top: int) -> tuple[Source, ...]:
        """The documents nearest to the mean of `documents` and `vector`, without these; ClientFault "unknown_document"."""
        if unknown := [document for document in documents if document not in self._rows]:
            raise ClientFault("unknown_document", f"`documents`: {unknown[0]!r} is not in the index",
                              f"ids are those of the dataset, such as {next(iter(self._rows))!r}")  # fmt: skip
        known = [self._rows[document] for document in documents]
        liked = [*self._documents[known], *([vector] if vector is not None else [])]
        scores = self._documents @ unit(np.mean(liked, axis=0))
        scores[known] = -np.inf
        numbers, found = _best(scores, min(top, len(scores) - len(set(known))))
        return self._sources(np.asarray(self._starts)[numbers], found)

    def _sources(self, rows: NDArray[np.intp], scores: Array) -> tuple[Source, ...]:
        taken = self._table.take(rows).to_pylist()
        return tuple(Source(**row, score=round(float(score), 6)) for row, score in zip(taken, scores, strict=True))


def _best(scores: Array, top: int) -> tuple[NDArray[np.intp], Array]:
    """(positions, scores) of the highest `top`, best first; of equals the first."""
    top = min(top, len(scores))
    chosen = np.sort(np.argpartition(-scores, top - 1)[:top]) if top else np.zeros(0, np.intp)
    order = chosen[np.argsort(-scores[chosen], kind="stable")]
    return order, scores[order]


def _invalid(name: str, what: str) -> ClientFault:
    return ClientFault("invalid_index", f"{name}: {what}", 'deploy an artifact of kind "index", as retriever/1.index makes it')
