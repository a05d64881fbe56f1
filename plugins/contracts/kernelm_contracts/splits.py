"""The files of a dataset's splits, and what stands in them: the one place that knows where `data/1` puts them.

Rows lie in `<split>.parquet`, or, of a corpus, in the shards `<split>/*.parquet`; packed token ids in `packed/<split>/*.parquet`.
pyarrow is declared as the extra `kernelm-contracts[texts]`, and imported only where a file is read.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kernelm_sdk.errors import ClientFault

SPLITS = ("train", "validation", "test")
BATCH = 1024  # rows


def files(folder: Path, split: str, *, packed: bool = False) -> list[Path]:
    """The files of a split, in their order; none if the dataset has no such split."""
    if packed:
        return sorted((folder / "packed" / split).glob("*.parquet"))
    return [path for path in (folder / f"{split}.parquet", *sorted((folder / split).glob("*.parquet"))) if path.is_file()]


def batches(folder: Path, split: str, columns: Sequence[str], *, packed: bool = False, rows: int = BATCH) -> Iterator[Any]:
    """The named columns of a split, in that order, as record batches of at most `rows` rows, none of them empty. ClientFault
    "invalid_dataset", which names the file, for one that is broken or has no such column; OSError for a disk that fails."""
    for path in files(folder, split, packed=packed):
        yield from _read(path, path.relative_to(folder).as_posix(), list(columns), rows)


def _read(path: Path, name: str, columns: list[str], rows: int) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            if absent := [column for column in columns if column not in there]:
                raise _invalid(name, f"no column {', '.join(absent)}; there are {', '.join(there)}")
            for batch in file.iter_batches(rows, columns=columns):
                if batch.num_rows:
                    yield batch.select(columns)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # what is broken inside a file comes without a number
            raise
        raise _invalid(name, str(error).partition("\n")[0].replace(f"{path.parent}/", "")) from None


def _invalid(file: str, what: str) -> ClientFault:
    return ClientFault("invalid_dataset", f"dataset: {file}: {what}", "prepare the dataset again with data/1")
