"""Token ids of a corpus of `data/1`, packed into sequences, on disk as one flat array: a corpus need not fit into memory."""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.splits import batches, files
from kernelm_sdk.errors import ClientFault
from kernelm_trainer.lines import refuse
from kernelm_trainer.processes import ALONE, Processes

IDS, LENGTHS = "tokens.int32", "lengths.npy"


class Sequences(NamedTuple):
    """Sequence i of a split is `ids[starts[i] : ends[i]]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    highest: int  # id

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.starts)

    def row(self, i: int) -> NDArray[np.int64]:
        return np.asarray(self.ids[self.starts[i] : self.ends[i]], np.int64)


def has_packed(folder: Path) -> bool:
    return (folder / "packed").is_dir()


def read_packed(folder: Path, split: str, block: int, work: Path, processes: Processes = ALONE) -> Sequences:
    """The sequences of packed/<split>/*.parquet, cut into pieces of `block` tokens (0: as they are); a rest of one token, which
    predicts nothing, is left out. Their ids lie in `work`, where one process decodes them for all that share it. ClientFault
    "invalid_dataset" for what is missing or broken."""
    flat = work / split
    processes.once(lambda: None if flat.is_dir() else _flatten(folder, split, flat))
    ends = np.cumsum(np.load(flat / LENGTHS))
    ids = np.memmap(flat / IDS, np.int32, "r")
    starts = np.concatenate([[0], ends[:-1]])
    if block:
        pieces = [np.arange(a, b, block) for a, b in zip(starts, ends, strict=True)]
        ends = np.concatenate([np.minimum(p + block, b) for p, b in zip(pieces, ends, strict=True)])
        starts = np.concatenate(pieces)
    kept = ends - starts > 1
    return Sequences(ids, starts[kept], ends[kept], int(ids.max()))


def _flatten(folder: Path, split: str, flat: Path) -> None:
    """Write ids and lengths of the sequences of a split to the folder `flat`, which appears when it is whole."""
    if not files(folder, split, packed=True):
        raise refuse(f"packed/{split}", "holds no .parquet file", "prepare the corpus with pack.length and a share for this split")
    part = flat.with_name(f"{split}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    lengths = []
    with (part / IDS).open("wb") as out:
        for batch in batches(folder, split, ("input_ids",), packed=True):
            column = batch.column(0)
            lengths.append(column.value_lengths().to_numpy())
            out.write(column.flatten().to_numpy().astype(np.int32, copy=False).tobytes())
    whole = np.concatenate(lengths, dtype=np.int64) if lengths else np.zeros(0, np.int64)
    if not whole.sum():
        raise refuse(f"packed/{split}", "has no tokens", "give the split a larger share")
    np.save(part / LENGTHS, whole)
    part.rename(flat)


def longest(sequences: Sequences) -> int:
    return int((sequences.ends - sequences.starts).max())


def check_vocabulary(sequences: Sequences, vocabulary: int) -> None:
    """ClientFault "base_mismatch" if a token id has no embedding."""
    if sequences.highest >= vocabulary:
        raise ClientFault("base_mismatch",
                          f"dataset: column input_ids has id {sequences.highest}, the model has {vocabulary} embeddings",
                          "prepare the dataset with the tokenizer of this base")  # fmt: skip
