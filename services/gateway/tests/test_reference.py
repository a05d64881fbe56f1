"""The committed documents are what the contracts say, and are valid by the standards they claim."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from kernelm.testing.parts import absent
from kernelm_cli import reference
from kernelm_contracts.server import ClassifyReply, Label
from kernelm_sdk.contract import CONTRACTS
from kernelm_sdk.events import EVENTS

ROOT = Path(__file__).resolve().parents[3]
OFFICIAL = ROOT / "build/npm/node_modules/@asyncapi/specs/schemas/3.0.0-without-$id.json"  # .ci/run installs it


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return reference.asyncapi()


def test_the_committed_documents_are_fresh() -> None:
    assert reference.stale() == [], "run: python -m kernelm_cli.reference write"


def test_the_same_contracts_give_the_same_bytes() -> None:
    code = ("import hashlib; from kernelm_cli.reference import documents; "
            "print(hashlib.sha256(repr(sorted(documents().items())).encode()).hexdigest())")  # fmt: skip
    runs = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
            for seed in ("1", "2")}  # fmt: skip
    assert len(runs) == 1


def test_check_says_what_is_stale_and_write_mends_it(tmp_path: Path) -> None:
    assert len(reference.write(tmp_path)) == len(reference.documents()) > 20
    assert reference.stale(tmp_path) == []
    assert reference.write(tmp_path) == [], "nothing is written twice"
    (tmp_path / reference.SCHEMAS / "server.v1.json").write_text("{}")
    (tmp_path / reference.PROTOS / "server_v1.proto").unlink()
    (tmp_path / reference.PROTOS / "old_v1.proto").write_text("")
    assert [line.split("/")[-1] for line in reference.stale(tmp_path)] == [
        "server.v1.json: differs from the contracts", "server_v1.proto: missing",
        "old_v1.proto: no contract gives this file"]  # fmt: skip
    assert len(reference.write(tmp_path)) == 3
    assert reference.stale(tmp_path) == []


def test_a_third_partys_contract_changes_nothing() -> None:
    code = ("from kernelm_cli.reference import stale; from kernelm_sdk.contract import Contract\n"
            "class Theirs(Contract, name='theirs', major=1): ...\nprint(stale())")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_schemas_accept_what_is_sent_and_refuse_what_is_not() -> None:
    for contract in reference.contracts():
        jsonschema.Draft202012Validator.check_schema(contract.schema())
    schema = CONTRACTS["server/1"].schema()
    validator = jsonschema.Draft202012Validator({**schema["methods"]["classify"]["reply"], "$defs": schema["$defs"]})
    reply = msgspec.to_builtins(ClassifyReply("news", 1, "sha256:00", ((Label("a", 1.0),),), 1, 1.0))
    plain = msgspec.json.decode(msgspec.json.encode(reply))
    assert validator.is_valid(plain)
    assert not validator.is_valid(plain | {"generation": "one"})


def test_asyncapi_is_valid(document: dict[str, Any]) -> None:
    """Against AsyncAPI's own JSON Schema, which must also refuse a document that is not valid."""
    if not OFFICIAL.exists():
        absent("AsyncAPI's schema is not here: npm install --prefix build/npm @asyncapi/specs")
    validator = jsonschema.Draft7Validator(msgspec.json.decode(OFFICIAL.read_bytes()))
    plain = msgspec.json.decode(msgspec.json.encode(document))
    assert [f"{list(e.path)}: {e.message[:200]}" for e in validator.iter_errors(plain)] == []
    for path, bad in (("action", "answer"), ("channel", {"ref": "x"})):
        broken = copy.deepcopy(plain)
        broken["operations"]["svc.jobs.v1.get"][path] = bad
        assert not validator.is_valid(broken)


def test_asyncapi_references_exist(document: dict[str, Any]) -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            return [r for k, v in node.items() for r in ([v] if k == "$ref" else references(v))]
        return [r for v in node for r in references(v)] if isinstance(node, list) else []

    found = references(document)
    assert len(found) > 300
    for reference_ in set(found):
        node: Any = document
        for part in reference_.removeprefix("#/").split("/"):
            assert part in node, reference_
            node = node[part]


def test_asyncapi_says_what_a_field_is_and_in_which_unit(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["ClassifyReply"]["properties"]["took_ms"]["description"] == "in the server; ms"
    assert schemas["kernelm_sdk.system.common.Limits"]["properties"]["pids"]["description"] == "processes and threads; processes"


def test_asyncapi_has_every_call_and_event(document: dict[str, Any]) -> None:
    addresses = {c["address"] for c in document["channels"].values()}
    assert {"model.{model}.classify.{caller}", "svc.server.v1.classify.{caller}", "svc.jobs.v1.follow-run.{caller}",
            "inst.{instance}.trainer.v1.train.{caller}", "inst.{instance}.plugin.v1.drain.{caller}",
            "evt.job.state.{source}"} <= addresses  # fmt: skip
    assert "svc.trainer.v1.train.{caller}" not in addresses, "a job is handed to an instance"
    assert "svc.plugin.v1.drain.{caller}" not in addresses, "only instances answer it"
    ours = {t for t, e in EVENTS.items() if e.__module__.startswith(reference.DECLARED_IN)}
    assert {a.split(".", 1)[1].removesuffix(".{source}") for a in addresses if a and a.startswith("evt.")} == ours
    headers = document["components"]["schemas"]["headers.event"]
    assert document["components"]["messages"]["evt.job.state"]["headers"] == {"$ref": "#/components/schemas/headers.event"}
    assert set(headers["required"]) >= {"ce-id", "ce-type", "ce-source", "ce-specversion"}
