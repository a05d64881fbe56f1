"""What is looked at in mapped files does not stay in memory."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kernelm_contracts.data import Deduplicate, Split
from kernelm_data.corpus import near
from kernelm_data.corpus.first import SCHEMA, Batch
from kernelm_data.corpus.sketches import Sketcher, shape, text_hash
from kernelm_data.corpus.store import Documents

MB = 2**20
SIZE = 200_000  # bytes of a text
PERMUTATIONS = Deduplicate().permutations


def resident(path: Path) -> int:
    """Bytes of the file that this process has in memory by a mapping."""
    maps = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(int(kb) * 1024 for part in maps if str(path) in part for kb in re.findall(r"(?m)^Rss: +(\d+) kB", part))


def texts(count: int) -> Iterator[str]:
    """Real enough: two of each, near duplicates of each other."""
    draw = random.Random(0)
    words = [f"word{n}" for n in range(5000)]
    for _ in range(count // 2):
        text = " ".join(draw.choices(words, k=SIZE // 9))
        yield text
        yield text + " and an end of its own"


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path, batch, sketcher = tmp_path / "docs.arrow", Batch(PERMUTATIONS), Sketcher(PERMUTATIONS)
    for number, text in enumerate(texts(160)):
        data, signature = text.encode(), np.empty(PERMUTATIONS, np.uint32)
        sketcher.signature(sketcher.grams(np.frombuffer(data, np.uint8)), signature)
        batch.add(str(number), data, "s", "", "en", text_hash(data), signature.tobytes())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(batch.record_batch())
    return path


def test_memory_of_what_was_looked_at_is_given_back(shard: Path) -> None:
    documents = Documents(shard)
    before = [bytes(documents.text(row)) for row in range(len(documents))]
    assert resident(shard) > 20 * MB
    documents.release()
    assert resident(shard) < MB
    assert [bytes(documents.text(row)) for row in range(len(documents))] == before  # and can be looked at again


def test_comparing_many_texts_keeps_few_of_them_in_memory(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "LOOKED", 4 * MB)
    seen: list[int] = []
    text = Documents.text
    monkeypatch.setattr(Documents, "text", lambda self, row: (seen.append(resident(shard)), text(self, row))[1])
    settings = Deduplicate()
    outcome = near.deduplicate([shard], 0, settings, Split(0, 0), shape(settings.jaccard, PERMUTATIONS), lambda *_: None)
    assert outcome.near.documents_in - outcome.near.documents_out == 80
    assert len(seen) == 160
    assert max(seen) < 16 * MB  # of 32
