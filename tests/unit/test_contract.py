"""Declaring a contract derives its subjects, schemas and hash; a wrong declaration is an error at import."""

from typing import Any, ClassVar

import msgspec
import pytest

from kernelm_sdk.contract import CONTRACTS, Contract, find_contract, method_of, streamed, token, unary
from kernelm_sdk.events import EVENTS, Event, envelope, received


class Ask(msgspec.Struct, frozen=True):
    text: str


class Happened(Event, frozen=True):
    TYPE: ClassVar[str] = "test.happened"
    count: int


class Sample(Contract, name="sample", major=2):
    events = (Happened,)

    @unary
    async def ask_twice(self, request: Ask, call: Any) -> Ask:
        """Ask, and ask again."""
        ...


def test_subjects_follow_from_the_declaration() -> None:
    method = method_of(Sample.ask_twice)
    assert method.subject("acme") == "svc.sample.v2.ask-twice.acme"
    assert method.subject("acme", "news") == "model.news.ask-twice.acme"
    assert method.doc == "Ask, and ask again."


def test_schema_hash_ignores_descriptions_and_notices_fields() -> None:
    before = Sample.schema_hash()
    assert before == Sample.schema_hash()
    assert len(before) == 16

    class Wider(msgspec.Struct, frozen=True):
        text: str
        more: int = 0

    class Other(Contract, name="other", major=1):
        @unary
        async def ask_twice(self, request: Wider, call: Any) -> Ask: ...

    assert Other.schema_hash() != before
    assert set(Sample.schema()["$defs"]) == {"Ask", "Happened"}


def test_a_contract_or_event_declared_twice_is_an_error() -> None:
    with pytest.raises(TypeError, match="declared twice"):
        type("Again", (Contract,), {}, name="sample", major=2)
    with pytest.raises(TypeError, match="defined twice"):

        class Elsewhere(Event, frozen=True):
            TYPE: ClassVar[str] = "test.happened"

    with pytest.raises(TypeError, match="<domain>"):

        class Nameless(Event, frozen=True):
            TYPE: ClassVar[str] = "flat"


def test_a_method_must_take_and_give_structs() -> None:
    with pytest.raises(TypeError, match=r"request must be a msgspec\.Struct"):

        class Wrong(Contract, name="wrong", major=1):
            @unary
            async def go(self, request: dict, call: Any) -> Ask: ...  # type: ignore[type-arg]

    with pytest.raises(TypeError, match="reply"):

        class Flat(Contract, name="flat", major=1):
            @streamed
            async def go(self, request: Ask, call: Any) -> Ask: ...


@pytest.mark.parametrize("name", ["", "Upper", "a.b", "a b", "-a", "x" * 64, "a*"])
def test_tokens_that_may_not_stand_in_a_subject(name: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        token(name)


def test_an_unknown_contract_names_the_known_ones() -> None:
    with pytest.raises(LookupError, match="sample/2"):
        find_contract("nothing/1")
    assert CONTRACTS["sample/2"] is Sample


def test_an_event_survives_the_wire_and_a_flipped_bit_is_seen() -> None:
    subject, body, headers = envelope(Happened(count=3), "acme", "b00t", 7)
    assert subject == "evt.test.happened.acme"
    assert headers["ce-id"] == headers["Nats-Msg-Id"] == "acme.b00t.7"
    back = received(subject, body, headers)
    assert (back.event, back.source, back.source_sequence, back.intact) == (Happened(count=3), "acme", 7, True)
    flipped = bytes([body[0], *body[1:-2], body[-2] ^ 1, body[-1]])
    assert not received(subject, flipped, headers).intact
    assert EVENTS["test.happened"] is Happened


def test_the_source_is_the_subject_and_not_what_the_headers_say() -> None:
    _, body, headers = envelope(Happened(count=3), "mallory", "b", 1)
    assert received("evt.test.happened.acme", body, headers).source == "acme"
