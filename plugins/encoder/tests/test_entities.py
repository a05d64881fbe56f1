"""Labels of tokens become entities."""

import numpy as np
import pytest

from kernelm_contracts.server import Entity
from kernelm_encoder.entities import Piece, entities

LABELS = ("O", "B-person", "I-person", "B-place", "I-place")


def found(tags: list[str], labels: tuple[str, ...] = LABELS) -> list[tuple[str, int, int]]:
    """The entities of a text of words of one letter, "a b c ...", each of one token."""
    logits = np.full((len(tags), len(labels)), -9.0, np.float32)
    for row, tag in enumerate(tags):
        logits[row, labels.index(tag)] = 9.0
    pieces = [Piece(k, 2 * k, 2 * k + 1) for k in range(len(tags))]
    return [(e.label, e.start, e.end) for e in entities(logits, pieces, labels)]


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        (["O", "B-person", "I-person", "O"], [("person", 2, 5)]),
        (["B-person", "B-person"], [("person", 0, 1), ("person", 2, 3)]),
        (["B-person", "I-place"], [("person", 0, 1), ("place", 2, 3)]),
        (["I-place", "I-place", "O", "I-place"], [("place", 0, 3), ("place", 6, 7)]),
        (["O", "O"], []),
    ],
)
def test_words_that_belong_together_are_one_entity(tags: list[str], wanted: list[tuple[str, int, int]]) -> None:
    assert found(tags) == wanted


def test_labels_without_prefixes_and_of_bioes() -> None:
    assert found(["name", "name", "O", "name"], ("O", "name")) == [("name", 0, 3), ("name", 6, 7)]
    assert found(["S-x", "S-x", "B-x", "I-x", "E-x"], ("O", "S-x", "B-x", "I-x", "E-x")) == [("x", 0, 1), ("x", 2, 3), ("x", 4, 9)]


def test_a_word_has_the_label_of_its_first_piece_and_the_mean_of_its_words_scores() -> None:
    logits = np.log(np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.9, 0.1]], np.float32))
    pieces = [Piece(0, 0, 3), Piece(0, 3, 6), Piece(1, 7, 9), Piece(-1, 0, 0)]
    assert entities(logits, pieces, ("O", "x")) == (Entity("x", 0, 9, pytest.approx(0.8)),)
