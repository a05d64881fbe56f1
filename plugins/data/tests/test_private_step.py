"""Private data as a step of `prepare`, as the method `redact`, and what may never be seen of it outside the texts."""

import msgspec
import pyarrow.parquet as pq
import pytest

from kernelm_contracts.data import PrepareRequest, Private, RedactPart, RedactRequest, RedactState, Split
from kernelm_data.plugin import DataPlugin
from kernelm_data.private import Placeholders, Span, detect, redact
from kernelm_data.private.spans import merge
from kernelm_data.settings import DataSettings
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Call

VALUES = (
    "jane.roe@example.org",
    "+1 202 555 0147",
    "4111 1111 1111 1111",
    "536-90-4399",
    "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
)
KEY = b"0123456789abcdef0123"


@pytest.fixture
def mail(tmp_path):
    """Twelve letters in two classes; five of them hold one private value each."""
    folder = tmp_path / "mail"
    for label in ("ask", "answer"):
        (folder / label).mkdir(parents=True)
        for n in range(6):
            value = VALUES[n] if label == "ask" and n < len(VALUES) else "the usual place"
            words = " ".join(f"{label}{n}{word}" for word in ("river", "mountain", "forest", "valley", "meadow"))
            (folder / label / f"{n}.txt").write_text(f"Dear all, about {words}: please write to {value} before the summer.\n")
    return folder


def texts(out) -> str:
    return "\n".join(text for path in sorted(out.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist())


def seen(out) -> str:
    """All that the dataset says about itself."""
    return "\n".join(path.read_text() for pattern in ("*.json", "*.jsonl", "*.md") for path in out.glob(pattern))


def test_redacted(run, mail):
    card, out = run(mail, split=Split(0, 0), private=Private())
    assert not [v for v in VALUES if v in texts(out) + seen(out)]
    assert "please write to [EMAIL] before" in texts(out)
    assert card.private is not None
    assert card.private.found == {"card": 1, "email": 1, "national_id": 1, "phone": 1, "secret": 1}
    assert (card.private.documents, card.private.affected, card.private.left) == (12, 5, {})
    step = next(s for s in card.steps if s.name == "private")
    assert (step.documents_in, step.documents_out) == (12, 12)
    assert step.changed["email redacted"] == 1
    assert "none of it is left" in (out / "card.md").read_text()


def test_quarantined(run, mail):
    card, out = run(mail, split=Split(0, 0), private=Private(action="quarantine"))
    step = next(s for s in card.steps if s.name == "private")
    assert (step.documents_in, step.documents_out) == (12, 7)
    assert step.reasons["private data: email"] == 1
    assert sum(step.reasons.values()) == 5
    assert not [v for v in VALUES if v in texts(out) + seen(out)]
    assert card.private.left == {}
    dropped = [msgspec.json.decode(line) for line in (out / "dropped.jsonl").read_bytes().splitlines()]
    assert ("ask/0.txt", "private", "private data: email") in {(d["id"], d["step"], d["reason"]) for d in dropped}


def test_reported(run, mail):
    card, out = run(mail, split=Split(0, 0), private=Private(action="report", types=("email", "phone")))
    assert [v for v in VALUES if v in texts(out)] == list(VALUES)
    assert not [v for v in VALUES if v in seen(out)]
    assert card.private.found == card.private.left == {"email": 1, "phone": 1}
    assert card.private.types == ("email", "phone")
    assert "left in the dataset: 1 email, 1 phone" in (out / "card.md").read_text()


def test_nobody_looked(run, mail):
    card, out = run(mail, split=Split(0, 0))
    assert card.private is None
    assert "nobody looked" in (out / "card.md").read_text()


def test_texts_that_differ_in_private_values_only_are_duplicates(run, tmp_path):
    for label in ("a", "b"):
        (tmp_path / "m" / label).mkdir(parents=True)
        for n in range(2):
            (tmp_path / "m" / label / f"{n}.txt").write_text(
                f"The parcel of class {label} is ready, says user{n}@example.org today.\n"
            )
    card, _ = run(tmp_path / "m", split=Split(0, 0), private=Private())
    assert sum(s.documents for s in card.splits.values()) == 2


def test_settings_that_make_no_sense(run, mail):
    for private, named in ((Private(types=()), "types"), (Private(style="hash"), "key")):
        with pytest.raises(ClientFault, match=named):
            run(mail, private=private)


def plugin(tmp_path, key: bytes = KEY) -> DataPlugin:
    (tmp_path / "key").write_bytes(key)
    return DataPlugin(None, DataSettings(str(tmp_path / "key")))


async def test_redact_answers_for_each_text(tmp_path):
    request = RedactRequest(
        ("Mail a@example.org or b@example.org.", "Nothing here.", "", "Again a@example.org"), Private(style="number")
    )
    answer = await plugin(tmp_path).redact(request, Call("gateway"))
    assert answer.texts == ("Mail [EMAIL_1] or [EMAIL_2].", "Nothing here.", "", "Again [EMAIL_1]")
    assert answer.found == ({"email": 2}, {}, {}, {"email": 1})


async def test_a_hash_needs_the_key_and_says_the_same_everywhere(tmp_path):
    request = RedactRequest(("call +1 202 555 0147", "call +12025550147"), Private(style="hash"))
    once = await plugin(tmp_path).redact(request, Call("gateway"))
    assert once.texts[0] == once.texts[1]
    assert once.texts == (await plugin(tmp_path).redact(request, Call("gateway"))).texts
    assert once.texts != (await plugin(tmp_path, KEY[::-1]).redact(request, Call("gateway"))).texts
    for settings in (DataSettings(), DataSettings(str(tmp_path / "absent"))):
        with pytest.raises(ClientFault) as caught:
            await DataPlugin(None, settings).redact(request, Call("gateway"))
        assert caught.value.code == "no_key"
    with pytest.raises(ClientFault, match="16 bytes"):
        await plugin(tmp_path, b"short").redact(request, Call("gateway"))


async def test_redact_does_nothing_else(tmp_path):
    with pytest.raises(ClientFault, match="quarantine"):
        await plugin(tmp_path).redact(RedactRequest(("x",), Private(action="quarantine")), Call("gateway"))


def test_overlapping_spans_become_one_that_leaves_nothing():
    spans = [Span(5, 20, "phone", 0.9, "p"), Span(0, 10, "card", 0.9, "c"), Span(30, 31, "ip", 1, "i")]
    assert [(s.start, s.end, s.type) for s in merge(spans)] == [(0, 20, "card"), (30, 31, "ip")]
    assert redact("x" * 31, merge(spans)) == "[CARD]" + "x" * 10 + "[IP]"


def test_numbers_hold_for_spellings_of_one_value():
    text = "Tel. +49 30 901820, (+49) 30/901820?, JANE@example.org and jane@example.org"
    assert redact(text, detect(text), placeholders=Placeholders("number")).endswith("[EMAIL_1] and [EMAIL_1]")


@pytest.mark.parametrize("bad", ["emails", "e-mail"])
def test_unknown_types_are_named(bad):
    with pytest.raises(ValueError, match=bad):
        detect("x", [bad])
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"source": "s", "private": {"types": [bad]}}, PrepareRequest)


async def test_pieces_of_an_answer_are_redacted_by_any_instance(tmp_path):
    """All that lasts between two pieces is in the state; each is answered by a plugin of its own here."""
    text = "The number is 4111 1111 1111 1111, and the address jane.roe@example.org, they say. 电话13812345678。"
    state, given_out, found = RedactState(), "", 0
    for at in range(0, len(text), 5):
        part = RedactPart(text[at : at + 5], state, at + 5 >= len(text))
        answer = await plugin(tmp_path).redact_part(part, Call("gateway"))
        state, given_out = answer.state, given_out + answer.text
        found += sum(answer.found.values())
    assert given_out == "The number is [CARD], and the address [EMAIL], they say. 电话[PHONE]。"
    assert (found, state) == (3, RedactState())


@pytest.mark.parametrize("part", [RedactPart("x", RedactState("ab", 3)), RedactPart("x", private=Private(style="number"))])
async def test_parts_that_make_no_sense_are_refused(tmp_path, part):
    with pytest.raises(ClientFault):
        await plugin(tmp_path).redact_part(part, Call("gateway"))
