"""Hints for names that there are not."""

from typing import Any

import msgspec
import pytest

from kernelm_sdk.errors import ClientFault
from kernelm_sdk.nearest import field_hint, hint
from kernelm_sdk.plugin import parse_manifest
from kernelm_sdk.system import Manifest

HEAD = 'name = "p"\nversion = "1"\nsummary = ""\ncontracts = ["data/1"]\nentry = "m:C"\n'


class Leaf(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    green_side: int = 0


class Tree(msgspec.Struct, forbid_unknown_fields=True):
    leaf: Leaf | None = None
    many: tuple[Leaf, ...] = ()
    pair: tuple[int, Leaf] = (0, Leaf())
    named: dict[str, list[Leaf]] = {}


def test_a_name() -> None:
    assert hint("gatway", ["gateway", "jobs"]) == "did you mean 'gateway'?"
    assert hint("zzz", ["gateway", "jobs", "jobs"]) == "known here: gateway, jobs"
    assert hint("x", []) == "known here: nothing"


@pytest.mark.parametrize("where", [
    lambda leaf: {"leaf": leaf}, lambda leaf: {"many": [{}, leaf]}, lambda leaf: {"pair": [1, leaf]},
    lambda leaf: {"named": {"a.b": [leaf]}},
])  # fmt: skip
def test_a_field_however_deep(where: Any) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(where({"green-sides": 1}), Tree)
    assert field_hint(caught.value, Tree) == "did you mean 'green-side'?"


@pytest.mark.parametrize(("value", "said"), [({"laef": {}}, "did you mean 'leaf'?"),
                                             ({"xyz": {}}, "known here: leaf, many, pair, named"), ({"leaf": 3}, "")])  # fmt: skip
def test_a_field_at_the_top_and_another_fault(value: Any, said: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, Tree)
    assert field_hint(caught.value, Tree) == said


@pytest.mark.parametrize(("lines", "said"), [
    ('runtime = ["venv"]', "did you mean 'runtimes'?"),
    ("max_job = 2", "did you mean 'max_jobs'?"),
    ("[needs]\ncpus = 1.0", "did you mean 'cpu'?"),
    ("[restart]\nintensty = 3", "did you mean 'intensity'?"),
    ("zzzz = 1", "known here: " + ", ".join(Manifest.__struct_fields__)),
    ("max_jobs = 'x'", ""),
])  # fmt: skip
def test_a_manifest_with_an_unknown_field_is_told_the_nearest_one(lines: str, said: str) -> None:
    with pytest.raises(ClientFault) as caught:
        parse_manifest(f"{HEAD}{lines}\n", "p/kernelm-plugin.toml")
    assert caught.value.code == "invalid_manifest"
    assert caught.value.remedy == "; ".join(part for part in (said, "see kernel/PROTOCOL.md, 'The manifest'") if part)
