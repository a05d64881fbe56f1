"""Probabilities, rankings and vectors."""

import math

import numpy as np
import pytest

from kernelm_encoder.answers import log_softmax, rank, unit_length


def test_probabilities_survive_extreme_logits() -> None:
    (best, worst), = rank(np.array([[-1e4, 1e4]], np.float32), ("a", "b"))
    assert (best.label, best.score, worst.score) == ("b", 1.0, 0.0)
    assert log_softmax(np.array([[0.0, 0.0, 0.0]])).tolist() == [[pytest.approx(-math.log(3))] * 3]


def test_labels_are_ranked_and_cut_to_the_top() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]))
    rows = rank(logits, ("a", "b", "c"))
    assert [[(label.label, round(label.score, 6)) for label in row] for row in rows] == [
        [("b", 0.5), ("c", 0.3), ("a", 0.2)], [("a", 0.6), ("c", 0.3), ("b", 0.1)]]  # fmt: skip
    assert [[label.label for label in row] for row in rank(logits, ("a", "b", "c"), top=1)] == [["b"], ["a"]]
    assert len(rank(logits, ("a", "b", "c"), top=9)[0]) == 3


def test_vectors_have_unit_length() -> None:
    assert unit_length(np.array([[3.0, 4.0], [0.0, -2.0]])) == ((0.6, 0.8), (0.0, -1.0))
