"""Datasets that this one must stay clear of: what they hold is not taken again, and test sets must not be in the training text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from kernelm_contracts.splits import SPLITS, batches, files
from kernelm_data.corpus.first import SCHEMA, Batch
from kernelm_data.corpus.kernels import Hashes
from kernelm_data.corpus.sketches import Sketcher, gram_table, text_hash
from kernelm_sdk.errors import ClientFault

ROWS = 512  # read at a time


def texts(folder: Path, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, bytes]]:
    """Id and text of the documents of a dataset. ClientFault `not_a_dataset` if it has none."""
    if not any(files(folder, split) for split in splits):
        raise ClientFault("not_a_dataset", f"{folder.name}: no {', '.join(splits)} in Parquet", "give the digest of a dataset")
    for split in splits:
        for batch in batches(folder, split, ("id", "text"), rows=ROWS):
            for id, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield id, text.encode()


def sketch_dataset(folder: Path, target: Path, permutations: int) -> Path:
    """The documents of a dataset as deduplication takes them; the file."""
    target.mkdir(parents=True, exist_ok=True)
    path = target / "docs.arrow"
    sketcher, signature = Sketcher(permutations), np.empty(permutations, np.uint32)
    temporary = target / "docs.arrow.part"
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        batch = Batch(permutations)
        for id, text in texts(folder):
            sketcher.signature(sketcher.grams(np.frombuffer(text, np.uint8)), signature)
            batch.add(id, text, "", "", "", text_hash(text), signature.tobytes())
            if batch.bytes > 8_000_000:
                writer.write_batch(batch.record_batch())
                batch = Batch(permutations)
        if batch.ids:
            writer.write_batch(batch.record_batch())
    temporary.replace(path)
    return path


def test_table(folders: Sequence[Path], words: int) -> Hashes:
    """A hash table of all n-grams of `words` words in the test splits of the datasets, or in all their splits where there is no
    test split. Texts with fewer words are not looked for: they would be found everywhere."""
    sketcher = Sketcher(128)
    found = []
    for folder in folders:
        splits = ("test",) if files(folder, "test") else ("train", "validation")
        for _, text in texts(folder, splits):
            grams = sketcher.grams(np.frombuffer(text, np.uint8), words)
            if len(grams) > 1 or len(text.split()) >= words:
                found.append(np.unique(grams))
    return gram_table(np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64))
