"""Who is meant by a part of a name, told by the text alone: no model is asked."""

import pytest

from kernelm_data.private.persons import MOST, Persons
from kernelm_data.private.spans import Span, merge


def named(text: str, *full: str) -> list[str]:
    """What is taken for names in a text, in which the model finds `full`."""
    persons = Persons()
    found = [(text.index(name), text.index(name) + len(name)) for name in full]
    spans = merge(Span(a, b, "name", 1.0, "test") for a, b in (*persons.meet(text, found), *persons.again(text)))
    return [text[span.start : span.end] for span in spans]


@pytest.mark.parametrize(("text", "full", "expected"), [
    ("Gordon Brown spoke. Later Brown left.", ["Gordon Brown"], ["Gordon Brown", "Brown"]),
    ("Gordon Brown spoke. Brown's budget, and Gordon's.", ["Gordon Brown"], ["Gordon Brown", "Brown", "Gordon"]),
    ("Gordon Brown spoke at Brown University and at the Brown house.", ["Gordon Brown"], ["Gordon Brown"]),
    ("Chelsea beat Luton.", ["Chelsea", "Luton"], []),  # single words that nobody is named by
    ("She met Mr Blunkett and Dr. Maria de la Cruz.", [], ["Blunkett", "Maria de la Cruz"]),
    ("Then coach Warren Gatland and Prime Minister Tony Blair met.", [], ["Warren Gatland", "Tony Blair"]),
    ("The Lord Chancellor and Secretary General spoke to the Prime Minister Office.", [], []),
    ("The Bill Gates Foundation gave, said Bill Gates.", [], []),
    ("Jean-Pierre O'Neil's dog, O'Neil said.", ["Jean-Pierre O'Neil"], ["Jean-Pierre O'Neil", "O'Neil"]),
    ("mail Brown@example.org or a/Brown, Anna Brown", ["Anna Brown"], ["Anna Brown"]),
])  # fmt: skip
def test_who_is_named(text, full, expected):
    assert named(text, *full) == expected


def test_a_name_that_is_a_word_is_one_at_the_beginning_of_a_sentence():
    persons = Persons(("Theresa", "May", "Corbyn"))
    assert persons.again("May is a month.") == []
    assert persons.again("\u201cMay is a month.") == []
    assert persons.again("He told May so.") == [(8, 11)]
    assert persons.again("Corbyn is none.") == [(0, 6)]
    assert persons.again("Theresa May is two.") == [(0, 11)]


def test_what_is_remembered_has_an_end_and_goes_on_elsewhere():
    persons = Persons()
    for number in range(2 * MOST):
        name = f"Anna{number} Berg{number}"
        persons.meet(name, [(0, len(name))])
    assert len(persons.parts) == MOST
    last = f"Berg{2 * MOST - 1}"
    assert Persons(persons.parts).again(f"So {last} said.") == [(3, 3 + len(last))]
    assert persons.again("So Berg0 said.") == []
