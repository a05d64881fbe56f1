"""Entities are those of conlleval and seqeval, in each scheme of labels."""

import pytest

from kernelm_contracts.tags import spans


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ("O O", []),
        ("", []),
        # BIO
        ("O B-a I-a O", [("a", 1, 3)]),
        ("B-a B-a", [("a", 0, 1), ("a", 1, 2)]),
        ("B-a I-b", [("a", 0, 1), ("b", 1, 2)]),
        ("B-a I-a O I-a I-b B-b", [("a", 0, 2), ("a", 3, 4), ("b", 4, 5), ("b", 5, 6)]),
        ("B-new-york I-new-york", [("new-york", 0, 2)]),
        # IOB1: a B only where an entity follows one of its own type
        ("I-a I-a B-a I-a O I-b", [("a", 0, 2), ("a", 2, 4), ("b", 5, 6)]),
        # BIOES, and BILOU
        ("B-x I-x E-x", [("x", 0, 3)]),
        ("B-x L-x U-x U-x", [("x", 0, 2), ("x", 2, 3), ("x", 3, 4)]),
        ("S-x S-x B-x E-x", [("x", 0, 1), ("x", 1, 2), ("x", 2, 4)]),
        ("E-x E-x O E-x", [("x", 0, 1), ("x", 1, 2), ("x", 3, 4)]),
        ("S-x I-x", [("x", 0, 1), ("x", 1, 2)]),
        ("B-x E-x I-x", [("x", 0, 2), ("x", 2, 3)]),
        # plain types, and marks alone
        ("name name O name place", [("name", 0, 2), ("name", 3, 4), ("place", 4, 5)]),
        ("Bus-stop Bus-stop", [("Bus-stop", 0, 2)]),
        ("B I O B", [("_", 0, 2), ("_", 3, 4)]),
    ],
)
def test_labels_are_read_as_in_their_scheme(labels: str, wanted: list[tuple[str, int, int]]) -> None:
    assert spans(labels.split()) == wanted
