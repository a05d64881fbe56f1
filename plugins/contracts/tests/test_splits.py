"""Where the rows of a dataset are looked for, and what is said of files that can't be read."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kernelm_contracts.splits import batches, files
from kernelm_sdk.errors import ClientFault


def written(path, rows, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **more)


def test_shards_are_read_in_their_order_and_packed_ones_apart(tmp_path):
    for number in (1, 0, 10):
        rows = [{"text": f"{number}.{i}", "id": i} for i in range(3)]
        written(tmp_path / "train" / f"{number:05}.parquet", rows, row_group_size=1)
    written(tmp_path / "packed" / "train" / "00000.parquet", [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    found = [row for batch in batches(tmp_path, "train", ("id", "text"), rows=2) for row in batch.to_pylist()]
    assert [row["text"] for row in found] == [f"{number}.{i}" for number in (0, 1, 10) for i in range(3)]
    assert [name for batch in batches(tmp_path, "train", ("text",)) for name in batch.schema.names] == ["text"] * 3
    assert [row for batch in batches(tmp_path, "train", ("input_ids",), packed=True) for row in batch.column(0).to_pylist()] == [
        [1, 2, 3],
        [4],
    ]
    assert files(tmp_path, "test") == files(tmp_path, "test", packed=True) == []
    assert list(batches(tmp_path, "test", ("text",))) == []


def test_one_file_a_split_and_no_rows_in_it(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "test.parquet")
    assert [path.name for path in files(tmp_path, "test")] == ["test.parquet"]
    assert list(batches(tmp_path, "test", ("text",))) == []


@pytest.mark.parametrize("damage", ["no parquet", "cut off", "flipped", "other column"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, damage):
    path = tmp_path / "train" / "00003.parquet"
    written(path, [{"other" if damage == "other column" else "text": f"words {i} " * 50} for i in range(200)], compression="zstd")
    whole = path.read_bytes()
    if damage == "no parquet":
        path.write_bytes(b"<html>")
    elif damage == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        path.write_bytes(whole[:40] + bytes(byte ^ 0xFF for byte in whole[40:200]) + whole[200:])
    with pytest.raises(ClientFault, match=r"dataset: train/00003\.parquet: .") as caught:
        list(batches(tmp_path, "train", ("text",)))
    assert caught.value.code == "invalid_dataset"
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.remedy


def test_a_link_that_leads_nowhere_is_no_file(tmp_path):
    (tmp_path / "train.parquet").symlink_to("nowhere")
    written(tmp_path / "train" / "0.parquet", [{"text": "a"}])
    assert [path.name for path in files(tmp_path, "train")] == ["0.parquet"]
