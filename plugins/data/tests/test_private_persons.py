"""Who is meant by a part of a name, told by the text alone: no model is asked."""

import re
from types import SimpleNamespace

import pytest

from kernelm_data.private.names import Names
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
    ("Franz Ferdinand have won. Simon Fuller has won.", ["Franz Ferdinand", "Simon Fuller"], ["Simon Fuller"]),
    ("Ann Lee and Simon Fuller have won, said singer Sean Moore.", ["Ann Lee", "Simon Fuller"],
     ["Ann Lee", "Simon Fuller", "Sean Moore"]),
    ("They met while Aston Villa were away.", ["Aston Villa"], []),
    ("The band Scissor Sisters sang in the city of Porto Alegre.", ["Scissor Sisters", "Porto Alegre"], []),
    ("Project Rub came to World Social Forum, as did the Lib Dems.", ["Project Rub", "World Social Forum", "the Lib Dems"], []),
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


class Model:
    """Takes two words in capital letters for a person, as spaCy would hand it over."""

    def pipe(self, units, as_tuples, batch_size):
        for unit, start in units:
            entities = [SimpleNamespace(label_="PERSON", start_char=match.start(), end_char=match.end())
                        for match in re.finditer(r"[A-Z]\w+ [A-Z]\w+", unit)]  # fmt: skip
            yield SimpleNamespace(text=unit, ents=entities), start


def found(text: str, persons: Persons | None = None) -> list[str]:
    spans = merge(Names(Model(), None).find(text, persons))
    return [text[span.start : span.end] for span in spans]


def test_whoever_is_named_in_a_text_is_known_all_over_it_however_many_there_are():
    few = "Today, Zorn left.\nOtto Zorn came.\n"
    many = "".join(f"Here is Anna Be{chr(97 + number % 26)}{chr(97 + number // 26)}.\n" for number in range(MOST))
    assert [name for name in found(f"{few}{many}It was Zorn, and Beaa.\n") if "Anna" not in name] == [
        "Zorn", "Otto Zorn", "Zorn", "Beaa",
    ]  # fmt: skip
    assert found(few, Persons()) == ["Otto Zorn"]  # of a stream the end is not known


def test_what_the_text_says_once_of_a_band_holds_for_all_of_it():
    assert found("Best were Scissor Sisters.\nThe band Scissor Sisters sang.\nSisters of Ann Lee came.\n") == ["Ann Lee"]


def test_every_unit_is_met_once(monkeypatch):
    met = []
    meet = Persons.meet
    monkeypatch.setattr(Persons, "meet", lambda self, unit, found: met.append(unit) or meet(self, unit, found))
    for persons in (None, Persons()):
        met.clear()
        found("Ann Lee came.\nLee left.\n", persons)
        assert met == ["Ann Lee came.\n", "Lee left.\n"]
