"""Within a major only what is optional is added, compared with the last release."""

import copy
from typing import Any

import pytest

from kernelm_cli.compatibility import RELEASED, breaks, broken
from kernelm_contracts.data import Data


@pytest.fixture
def schema() -> dict[str, Any]:
    return copy.deepcopy(Data.schema())


def test_no_contract_breaks_what_was_released() -> None:
    assert list(RELEASED.glob("*.json"))
    assert broken() == []


def test_optional_fields_methods_and_events_may_be_added(schema: dict[str, Any]) -> None:
    schema["$defs"]["PrepareRequest"]["properties"]["more"] = {"type": "string", "default": ""}
    schema["methods"]["other"] = schema["methods"]["describe"]
    schema["events"]["a.b"] = {"type": "object"}
    schema["$defs"]["Private"]["properties"]["style"]["enum"].append("other")
    assert breaks(Data.schema(), schema) == []


def _required(schema: dict[str, Any]) -> None:
    request = schema["$defs"]["PrepareRequest"]
    request["properties"]["more"] = {"type": "string"}
    request["required"].append("more")


CHANGES = {
    "prepare.request.more is required now": _required,
    "prepare.request.name is gone": lambda s: s["$defs"]["PrepareRequest"]["properties"].pop("name"),
    "prepare.request.clean.min_characters.type: was integer, and is string":
        lambda s: s["$defs"]["Clean"]["properties"]["min_characters"].update(type="string"),
    "prepare.reply.dataset is not required any more": lambda s: s["$defs"]["Prepared"]["required"].remove("dataset"),
    "prepare.request.private[0].style.enum: was ['hash', 'number', 'type'], and is ['hash', 'number']":
        lambda s: s["$defs"]["Private"]["properties"]["style"]["enum"].remove("type"),
    "method describe is gone": lambda s: s["methods"].pop("describe"),
    "method describe: kind was unary, and is job": lambda s: s["methods"]["describe"].update(kind="job"),
    "event dataset.prepared is gone": lambda s: s["events"].pop("dataset.prepared"),
}  # fmt: skip


@pytest.mark.parametrize("text", CHANGES)
def test_what_needs_another_major_is_named(text: str, schema: dict[str, Any]) -> None:
    CHANGES[text](schema)
    assert text in breaks(Data.schema(), schema)
