"""The reference pages say what the types say, and their examples are messages that the types accept."""

from typing import Any, ClassVar

import msgspec
import pytest

from kernelm_cli import reference
from kernelm_cli.reference_fields import Field, bare_numbers, comments, fields_of, in_words, structs_of
from kernelm_cli.reference_pages import PAGES, page_of, pages, read_examples
from kernelm_sdk.contract import Contract, Method
from kernelm_sdk.errors import FaultBody

CONTRACTS = reference.contracts()
METHODS = [(c, m) for c in CONTRACTS for m in c.methods.values()]


def of(contract: type[Contract]) -> str:
    return (reference.ROOT / page_of(contract)).read_text()


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: c.id())
def test_a_page_names_every_method_struct_field_and_event(contract: type[Contract]) -> None:
    page = of(contract)
    kinds = structs_of([t for m in contract.methods.values() for t in (m.request, m.reply)])
    for heading in [*contract.methods, *(e.TYPE for e in contract.events), *(f"struct {k.__name__}" for k in kinds)]:
        assert f"\n### {heading}\n" in page, heading
    anchors = [line[4:].lower().replace(" ", "-") for line in page.splitlines() if line.startswith("### ")]
    assert len(anchors) == len(set(anchors)), "two headings with the same anchor"
    for kind in [*kinds, *contract.events]:
        for field in msgspec.structs.fields(kind):
            assert f"| `{field.encode_name}` |" in page, f"{kind.__name__}.{field.name}"
    for target in {part.split(")")[0] for part in page.split("](#")[1:]}:
        assert target in anchors, f"no heading for the link #{target}"


@pytest.mark.parametrize(("contract", "method"), METHODS, ids=lambda v: v.name if isinstance(v, Method) else v.id())
def test_a_method_has_a_text_and_a_real_example(contract: type[Contract], method: Method) -> None:
    """Which a system has exchanged (kernelm_cli.reference_examples): it must fit the types of today."""
    assert method.doc, "say in its docstring what it does"
    example = read_examples(contract, reference.ROOT).methods.get(method.name)
    assert example is not None, "record it: python -m kernelm_cli.reference_examples"
    msgspec.convert(example.request, method.request)
    if example.fault is not None:
        assert msgspec.convert(example.fault, FaultBody).code
    else:
        msgspec.convert(example.reply, method.reply)
    assert msgspec.json.encode(example.request)[1:12].decode()[:1] in '"}'


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: c.id())
def test_examples_are_of_what_there_is(contract: type[Contract]) -> None:
    examples = read_examples(contract, reference.ROOT)
    assert set(examples.methods) <= set(contract.methods)
    types = {e.TYPE: e for e in contract.events}
    assert set(examples.events) == set(types), "record them: python -m kernelm_cli.reference_examples"
    for name, body in examples.events.items():
        msgspec.convert(body, types[name])


def test_permissions_are_those_that_the_broker_is_told() -> None:
    behind = {(c.id(), m.name): of(c).partition(f"\n### {m.name}\n")[2] for c, m in METHODS}
    found = {key: text.partition("| permission | ")[2] for key, text in behind.items()}
    wanted_of = {
        ("kernel/1", "enroll"): "whoever holds a join token |", ("kernel/1", "create-key"): "administrators alone |",
        ("work/1", "report"): "every plugin and every service |", ("data/1", "prepare"): "the job table alone",
        ("node/1", "start"): "administrators; a plugin by", ("plugin/1", "drain"): "the kernel and administrators |",
    }  # fmt: skip
    for key, wanted in wanted_of.items():
        assert found[key].startswith(wanted), (key, found[key][:80])
    assert "a key by its `models` and `methods` (`classify`)" in found["server/1", "classify"].splitlines()[0]


def test_no_number_is_without_a_unit() -> None:
    kinds = structs_of([t for c, m in METHODS for t in (m.request, m.reply)] + [e for c in CONTRACTS for e in c.events])
    assert {k.__name__: bare for k in kinds if (bare := bare_numbers(k))} == {}


def test_examples_hold_no_secret() -> None:
    for file in (reference.ROOT / PAGES / "examples").glob("*.json"):
        text = file.read_text()
        for begins in ("eyJ0", "SUA", "km_a", str(reference.ROOT), "/tmp/"):
            assert begins not in text, f"{file.name} holds {begins}"


class Inner(msgspec.Struct):
    n: int


class Sample(msgspec.Struct, forbid_unknown_fields=True):
    """One of each."""

    a: str  # what it is
    took_s: float = 0.0
    many: tuple[Inner, ...] = ()  # in order,
                                  # the oldest first
    # of the next
    # field
    either: Inner | None = None  # alone
    free: dict[str, float] = {}
    share: float = 0.5
    kind: ClassVar[str] = "not a field"


def test_what_a_source_says_of_a_field_is_found() -> None:
    assert fields_of(Sample) == [
        Field("a", "string", "", "", "what it is"),
        Field("took_s", "number", "0.0", "s", ""),
        Field("many", "list of [Inner](#struct-inner)", "[]", "", "in order, the oldest first"),
        Field("either", "[Inner](#struct-inner) or null", "null", "", "of the next field; alone"),
        Field("free", "object: string to number", "{}", "", ""),
        Field("share", "number", "0.5", "", ""),
    ]
    assert bare_numbers(Sample) == ["share"]
    assert structs_of([Sample]) == [Sample, Inner]
    assert comments(Inner) == {}
    assert in_words(Any) == "any value"


def test_a_change_of_a_contract_makes_its_page_stale() -> None:
    class Word(msgspec.Struct):
        word: str  # to be said

    class Theirs(Contract, name="theirs", major=1):
        """Says it."""

        from kernelm_sdk.contract import unary

        @unary
        async def say(self, request: Word, call: Any) -> Word:
            """Say it."""
            ...

    page = pages([Theirs], reference.ROOT)[page_of(Theirs)]
    assert "| `word` | string | required |  | to be said |" in page
    assert 'calls = ["theirs/1.say"]' in page
    assert "theirs/1" not in (reference.ROOT / PAGES / "README.md").read_text()
