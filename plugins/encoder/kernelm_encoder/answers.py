"""Logits to probabilities and labels, pooled states to vectors of unit length."""

import numpy as np

from kernelm_contracts.server import Label
from kernelm_encoder.model import Array


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of the probabilities, [documents, labels]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def rank(logits: Array, labels: tuple[str, ...], top: int = 0, multi: bool = False) -> tuple[tuple[Label, ...], ...]:
    """For each row the best `top` labels (0 for all) with their probabilities, best first: of one another's rivals, or of each by
    itself where a text may have several (`multi`)."""
    probabilities = _sigmoid(logits) if multi else np.exp(log_softmax(logits))
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, : top or len(labels)]
    return tuple(tuple(Label(labels[column], float(row[column])) for column in columns)
                 for row, columns in zip(probabilities, best, strict=True))  # fmt: skip


def _sigmoid(logits: Array) -> Array:
    result: Array = 0.5 * (1.0 + np.tanh(0.5 * logits))  # no overflow, as 1 / (1 + exp(-x)) has
    return result


def unit_length(embeddings: Array) -> tuple[tuple[float, ...], ...]:
    """Each row divided by its Euclidean norm."""
    vectors = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return tuple(map(tuple, vectors.tolist()))
