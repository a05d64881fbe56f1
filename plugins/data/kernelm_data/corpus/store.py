"""Random access to the documents of shards, without reading them all."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from mmap import MADV_DONTNEED, PROT_READ, mmap
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kernelm_contracts.splits import files


class Documents:
    """The documents of one `docs.arrow`, mapped into memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as disk:
            self._map = mmap(disk.fileno(), 0, prot=PROT_READ)
        file = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
        self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def release(self) -> None:
        """Give back the memory of what was looked at: else it counts as this process's as long as the file is open."""
        self._map.madvise(MADV_DONTNEED)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The documents, some MB at a time."""
        yield from self._batches

    def value(self, row: int, column: str) -> Any:
        """One value."""
        batch = bisect_right(self._starts, row) - 1
        return self._batches[batch].column(column)[row - self._starts[batch]]

    def text(self, row: int) -> npt.NDArray[np.uint8]:
        """The text of a document as UTF-8."""
        text = np.frombuffer(self.value(row, "text").as_buffer(), np.uint8)
        text.flags.writeable = False  # as that of any other text: kernels are compiled for one kind
        return text

    def id(self, row: int) -> str:
        return cast(str, self.value(row, "id").as_py())

    def ids(self) -> Iterator[str]:
        """The ids of all documents."""
        for batch in self._batches:
            yield from batch.column("id").to_pylist()

    def hashes(self) -> npt.NDArray[np.void]:
        """16 bytes for each document."""
        parts = [
            np.frombuffer(b.column("hash").buffers()[1], "V16", b.num_rows, b.column("hash").offset * 16) for b in self._batches
        ]
        return np.concatenate(parts) if parts else np.empty(0, "V16")

    def signatures(self, permutations: int) -> list[npt.NDArray[np.uint32]]:
        """Documents x permutations, in parts that stay on disk until they are looked at."""
        return [np.frombuffer(b.column("signature").buffers()[2], np.uint32, b.num_rows * permutations).reshape(-1, permutations)
                for b in self._batches]  # fmt: skip


class Rows:
    """Random access to the rows of a dataset: a row group is read when a row of it is asked for, and the last few are kept."""

    KEPT = 4

    def __init__(self, folder: Path, split: str = "train", columns: Sequence[str] | None = None) -> None:
        self._files = [pq.ParquetFile(path, memory_map=True) for path in files(folder, split)]
        self._columns = list(columns) if columns is not None else None
        self._groups = [(f, g, file.metadata.row_group(g).num_rows) for f, file in enumerate(self._files)
                        for g in range(file.metadata.num_row_groups)]  # fmt: skip
        self._starts = [0]
        for *_, rows in self._groups:
            self._starts.append(self._starts[-1] + rows)
        self._cache: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        group = bisect_right(self._starts, row) - 1
        if group not in self._cache:
            file, number, _ = self._groups[group]
            while len(self._cache) >= self.KEPT:
                del self._cache[next(iter(self._cache))]
            self._cache[group] = self._files[file].read_row_group(number, columns=self._columns)
        return cast(dict[str, Any], self._cache[group].slice(row - self._starts[group], 1).to_pylist()[0])
