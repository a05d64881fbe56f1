"""Labels of words to entities, for models of structure "token-classification": one reading for who scores and who serves them.

An entity is read as conlleval and seqeval (its default mode) do, whatever the scheme: IOB1 and BIO (Ramshaw and Marcus 1995, "Text
Chunking using Transformation-Based Learning"; Tjong Kim Sang and Veenstra 1999, "Representing Text Chunks"), BIOES, BILOU (U is
S, L is E). B and S begin one, E and S end it, another type begins one, and so does an I or E that has nothing to go on from.
Where labels are plain types, neighbours of one type are one entity, as transformers' pipeline reads them. Pure.
"""

from collections.abc import Sequence
from typing import NamedTuple

OUTSIDE, UNTYPED = "O", "_"
BEGINS, ENDS, MARKS = "BSU", "ESLU", "BIESLU"


class Span(NamedTuple):
    """An entity of a text."""

    label: str  # its type, without a mark; "_" where the labels are marks alone, as seqeval has it
    start: int  # first word
    end: int  # word behind the last one


def spans(labels: Sequence[str]) -> list[Span]:
    """The entities of a text, whose words have these labels, in its order."""
    found: list[Span] = []
    going_on = ""  # type of the entity that the next word may belong to
    for k, label in enumerate(labels):
        mark, kind = _read(label)
        if kind and kind == going_on and mark not in BEGINS:
            found[-1] = found[-1]._replace(end=k + 1)
        elif kind:
            found.append(Span(kind, k, k + 1))
        going_on = "" if mark in ENDS else kind
    return found


def _read(label: str) -> tuple[str, str]:
    """(mark, type); "I" for a plain type, "" as the type of what is outside."""
    if label == OUTSIDE:
        return "I", ""
    mark, _, kind = label.partition("-")
    if mark in [*MARKS]:
        return mark, kind or UNTYPED
    return "I", label
