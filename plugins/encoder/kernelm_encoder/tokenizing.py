"""Text to token ids with Hugging Face's `tokenizers`, and token ids to a padded batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HuggingFaceTokenizer

from kernelm_encoder.model import Document, invalid_model


class Tokenizer:
    """The tokenizer of an encoder: `tokenizer.json`, cut at `max_tokens`, with [CLS] and [SEP] or the like."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise invalid_model(path, str(error)) from None
        self._tokenizer.enable_truncation(max_length=max_tokens)
        self._tokenizer.no_padding()  # the file may ask for a fixed length

    def __call__(self, text: str) -> Document:
        ids = self._tokenizer.encode(text).ids
        return Document(len(ids), ids)


def pad(documents: Sequence[Document]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`input_ids` and `attention_mask` [documents, longest]. The padding is masked, so its id 0 has no influence."""
    longest = max(document.tokens for document in documents)
    ids = np.zeros((len(documents), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : document.tokens] = document.features
        mask[row, : document.tokens] = 1
    return ids, mask
