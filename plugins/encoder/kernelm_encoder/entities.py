"""Labels of tokens to entities: a word has the label of its first piece; `kernelm_contracts.tags` reads the labels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kernelm_contracts.server import Entity
from kernelm_contracts.tags import spans
from kernelm_encoder.answers import log_softmax
from kernelm_encoder.model import Array


class Piece(NamedTuple):
    """Where a token lies in its text."""

    word: int  # its number; -1 for tokens that are of no word ([CLS])
    start: int  # characters
    end: int


class _Word(NamedTuple):
    label: str
    score: float
    start: int
    end: int


def entities(logits: Array, pieces: Sequence[Piece], labels: Sequence[str]) -> tuple[Entity, ...]:
    """Of one text, in its order; `logits` [tokens, labels]."""
    words = _words(logits, pieces, labels)
    return tuple(Entity(span.label, words[span.start].start, words[span.end - 1].end,
                        float(np.mean([word.score for word in words[span.start : span.end]])))
                 for span in spans([word.label for word in words]))  # fmt: skip


def _words(logits: Array, pieces: Sequence[Piece], labels: Sequence[str]) -> list[_Word]:
    probabilities = np.exp(log_softmax(logits))
    words: list[_Word] = []
    last = -1
    for piece, row in zip(pieces, probabilities, strict=True):
        if piece.word >= 0 and piece.word == last:
            words[-1] = words[-1]._replace(end=piece.end)
        elif piece.word >= 0:
            best = int(row.argmax())
            words.append(_Word(labels[best], float(row[best]), piece.start, piece.end))
        last = piece.word
    return words
