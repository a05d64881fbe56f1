"""Text to token ids with Hugging Face's `tokenizers`, and token ids to a padded batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from tokenizers import Tokenizer as HuggingFaceTokenizer

from kernelm_encoder.entities import Piece
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
        """`features` are the token ids."""
        ids = self.encode(text).ids
        return Document(len(ids), ids)

    def encode(self, text: str) -> Encoding:
        """The token ids, and where each token lies in the text."""
        return self._tokenizer.encode(text)


def pieces(encoding: Encoding) -> list[Piece]:
    """Where each token lies in its text."""
    return [Piece(-1 if word is None else word, *span) for word, span in zip(encoding.word_ids, encoding.offsets, strict=True)]


def pad(texts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`input_ids` and `attention_mask` [texts, longest], of token ids. The padding is masked, so its id 0 has no influence."""
    longest = max(map(len, texts))
    ids = np.zeros((len(texts), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask
