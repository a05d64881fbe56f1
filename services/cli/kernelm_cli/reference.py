"""What is derived from the contracts and committed: JSON Schemas, the AsyncAPI document, the .proto files, the pages.

    python -m kernelm_cli.reference write     derive and write them
    python -m kernelm_cli.reference check     exit code 1 and a list if what is committed is stale

A contract is a typed Python class and everything else follows from it, so these files are never edited by hand; they are
committed for readers and for clients in other languages. Sources: JSON Schema 2020-12; AsyncAPI 3.0.0
(asyncapi.com/docs/reference/specification/v3.0.0); CloudEvents 1.0, "NATS Protocol Binding"; NATS ADR-32.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

import kernelm_contracts
from kernelm_cli import reference_pages
from kernelm_cli.reference_fields import fields_of, structs_of
from kernelm_gateway import proto_text, protobuf
from kernelm_sdk import system
from kernelm_sdk.contract import CONTRACTS, Contract, Method
from kernelm_sdk.errors import FaultBody
from kernelm_sdk.events import Event
from kernelm_sdk.serving import DEADLINE, ERROR, ERROR_CODE

ROOT = Path(__file__).resolve().parents[3]
SCHEMAS = Path("plugins/contracts/schemas")
PROTOS = Path("services/gateway/kernelm_gateway/proto")
ORIGIN = "Derived from contract {} by `python -m kernelm_cli.reference write`; do not edit."
DECLARED_IN = (system.__name__, kernelm_contracts.__name__)


def contracts() -> list[type[Contract]]:
    """The contracts that kernelm itself declares, by id; those of third parties are theirs to publish."""
    ours = (c for c in CONTRACTS.values() if c.__module__.startswith(DECLARED_IN))
    return sorted(ours, key=lambda c: (c.name, c.major))


def documents() -> dict[Path, str]:
    """Every derived file: path from the repository's root -> text. The same contracts give the same bytes."""
    files: dict[Path, str] = {}
    for contract in contracts():
        schema = {**contract.schema(), "schema_hash": contract.schema_hash()}
        files[SCHEMAS / f"{contract.name}.v{contract.major}.json"] = _json(schema)
        if protobuf.callable_methods(contract):
            text = proto_text.render(protobuf.describe(contract), ORIGIN.format(contract.id()))
            files[PROTOS / protobuf.file_name(contract)] = text
    files[SCHEMAS / "asyncapi.json"] = _json(asyncapi())
    return files | reference_pages.pages(contracts(), ROOT)


def _json(document: dict[str, Any]) -> str:
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n"


# ---- AsyncAPI ----

HEADERS = {
    "call": {"type": "object", "properties": {
        DEADLINE: {"type": "string", "description": "Unix seconds after which nobody waits for the answer"},
        "traceparent": {"type": "string", "description": "W3C Trace Context"}}},
    "fault": {"type": "object", "required": [ERROR, ERROR_CODE], "properties": {
        ERROR: {"type": "string", "description": "what was wrong, in one line (NATS ADR-32)"},
        ERROR_CODE: {"type": "string", "description": "the class of the fault in HTTP's terms (NATS ADR-32)"}}},
    "event": {"type": "object",
              "required": ["Nats-Msg-Id", "ce-id", "ce-specversion", "ce-type", "ce-source", "ce-time", "ce-sequence", "ce-digest"],
              "properties": {
        "Nats-Msg-Id": {"type": "string", "description": "equals ce-id: the stream drops a repeated publish"},
        "ce-id": {"type": "string", "description": "<source>.<boot>.<sequence>"},
        "ce-specversion": {"type": "string", "const": "1.0"},
        "ce-type": {"type": "string", "description": "<domain>.<name>, as in the subject"},
        "ce-source": {"type": "string", "description": "the publisher; trust the subject's last token instead"},
        "ce-time": {"type": "string", "format": "date-time"},
        "ce-datacontenttype": {"type": "string", "const": "application/json"},
        "ce-boot": {"type": "string", "description": "one start of the source"},
        "ce-sequence": {"type": "string", "description": "counts the source's events since its boot"},
        "ce-digest": {"type": "string", "description": "BLAKE2b-128 of the body, hex"}}},
}  # fmt: skip
PARAMETERS = {
    "caller": {"description": "the caller's name, fixed by its JWT"},
    "source": {"description": "the publisher's name, fixed by its JWT"},
    "model": {"description": "the name of a deployment"},
    "instance": {"description": "the id of one instance"},
}


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3.0 document of the whole bus: a channel for each subject of a call, a job's dispatch and an event."""
    document = _Document()
    for contract in contracts():
        for method in contract.methods.values():
            document.add_method(method)
        for event in contract.events:
            document.add_event(event, contract)
    return {
        "asyncapi": "3.0.0", "id": "urn:kernelm:bus", "defaultContentType": "application/json",
        "info": {"title": "kernelm", "version": version("kernelm"), "license": {"name": "Apache-2.0"},
                 "description": "Calls, jobs and events on kernelm's bus (NATS). The last token of a subject is who sends, and "
                                "the broker guards it. kernel/PROTOCOL.md specifies how a program joins."},
        "servers": {"broker": {"host": "127.0.0.1:4222", "protocol": "nats",
                               "description": "the NATS server of one's own installation: run/up.json names its port"}},
        "channels": document.channels, "operations": document.operations,
        "components": {"messages": document.messages, "schemas": document.schemas, "parameters": PARAMETERS},
    }  # fmt: skip


class _Document:
    """The parts in the making. A message stands in `components`, and channels refer to it under the same key."""

    def __init__(self) -> None:
        self.channels: dict[str, Any] = {}
        self.operations: dict[str, Any] = {}
        self.schemas, self._refs = _all_schemas()
        self.schemas |= {f"headers.{name}": schema for name, schema in HEADERS.items()}
        self.messages: dict[str, Any] = {"fault": {
            "summary": "In place of a reply: what was wrong, whose fault it is, and the remedy.",
            "headers": _ref("schemas", "headers.fault"), "payload": self._refs[FaultBody]}}  # fmt: skip

    def add_method(self, method: Method) -> None:
        key = f"{method.contract.name}.v{method.contract.major}.{method.name}"
        if method.kind == "job":
            request = {"allOf": [self._refs[system.Dispatch],
                                 {"type": "object", "properties": {"request": self._refs[method.request]}}]}  # fmt: skip
            reply: type[msgspec.Struct] = system.Empty
        else:
            request, reply = self._refs[method.request], method.reply
        self._message(f"{key}.request", request, "call", method.doc)
        self._message(f"{key}.reply", self._refs[reply])
        self._channel(f"{key}.reply", None, [f"{key}.reply", "fault"], "The caller's inbox.")
        for name, subject in _subjects(method).items():
            self._channel(name, subject, [f"{key}.request"])
            self.operations[name] = {
                "action": "receive", "channel": _ref("channels", name), "summary": _summary(method),
                "messages": [_ref("channels", name, "messages", f"{key}.request")],
                "reply": {"address": {"location": "$message.header#/reply-to", "description": "NATS's own reply subject"},
                          "channel": _ref("channels", f"{key}.reply"),
                          "messages": [_ref("channels", f"{key}.reply", "messages", m) for m in (f"{key}.reply", "fault")]},
            }  # fmt: skip

    def add_event(self, event: type[Event], contract: type[Contract]) -> None:
        name = f"evt.{event.TYPE}"
        summary = f"{protobuf.docstring(event)} Published by {contract.id()}."
        self._message(name, self._refs[event], "event", summary)
        self._channel(name, f"{name}.{{source}}", [name])
        self.operations[name] = {"action": "send", "channel": _ref("channels", name), "summary": summary,
                                 "messages": [_ref("channels", name, "messages", name)]}  # fmt: skip

    def _message(self, name: str, payload: dict[str, Any], headers: str = "", summary: str = "") -> None:
        message = {"name": name, "payload": payload}
        if headers:
            message["headers"] = _ref("schemas", f"headers.{headers}")
        self.messages[name] = message | ({"summary": summary} if summary else {})

    def _channel(self, name: str, address: str | None, messages: list[str], description: str = "") -> None:
        channel: dict[str, Any] = {"address": address, "messages": {m: _ref("components", "messages", m) for m in messages}}
        if parameters := {p: _ref("components", "parameters", p) for p in PARAMETERS if f"{{{p}}}" in (address or "")}:
            channel["parameters"] = parameters
        self.channels[name] = channel | ({"description": description} if description else {})


def _ref(*path: str) -> dict[str, str]:
    return {"$ref": "#/" + "/".join(("components", *path) if path[0] == "schemas" else path)}


def _subjects(method: Method) -> dict[str, str]:
    """Channel name -> subject with its parameters: where the method is called."""
    tail, key = method.tail("{caller}"), f"{method.contract.name}.v{method.contract.major}.{method.name}"
    one = {f"inst.{key}": f"inst.{{instance}}.{tail}"}
    if method.kind == "job" or method.contract is system.Lifecycle:
        return one
    subjects = {f"svc.{key}": f"svc.{tail}", **one}
    if method.scope == "model":
        subjects[f"model.{key}"] = method.subject("{caller}", "{model}")
    return subjects


def _summary(method: Method) -> str:
    """The first line of the docstring, and what kind of call it is."""
    kind = {"unary": "One request, one reply.",
            "streamed": "One request, many replies, the last one empty; the consumer grants credit.",
            "job": "A job, handed to an instance; it reports on svc.work.v1.report."}[method.kind]  # fmt: skip
    return f"{method.doc.splitlines()[0]} {kind}" if method.doc else kind


def _all_schemas() -> tuple[dict[str, Any], dict[type, dict[str, Any]]]:
    """The JSON Schema of every struct by name, and a reference to each type's."""
    kinds: dict[type, None] = {FaultBody: None, system.Dispatch: None, system.Empty: None}  # a dict keeps the order
    for contract in contracts():
        kinds |= {t: None for m in contract.methods.values() for t in (m.request, m.reply)} | dict.fromkeys(contract.events)
    refs, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for kind in structs_of(kinds):
        name = kind.__name__ if kind.__name__ in components else f"{kind.__module__}.{kind.__qualname__}"  # where two share it
        properties = components[name].get("properties", {})  # none where it is written as an array
        for field in fields_of(kind):
            if (schema := properties.get(field.name)) and "$ref" not in schema:
                schema |= {"description": text} if (text := "; ".join(filter(None, [field.text, field.unit]))) else {}
    return components, dict(zip(kinds, refs, strict=True))


# ---- the command ----


def stale(root: Path = ROOT) -> list[str]:
    """What is wrong with the derived files under `root`, a line each; none if they are what the contracts say."""
    wanted = documents()
    problems = []
    for path, text in wanted.items():
        if not (root / path).exists():
            problems.append(f"{path}: missing")
        elif (root / path).read_text() != text:
            problems.append(f"{path}: differs from the contracts")
    return problems + [f"{path}: no contract gives this file" for path in _present(root) if path not in wanted]


def write(root: Path = ROOT) -> list[Path]:
    """Write the derived files that differ, remove those that no contract gives any more; the paths of both."""
    wanted, changed = documents(), []
    for path, text in wanted.items():
        target = root / path
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            changed.append(path)
    for path in _present(root):
        if path not in wanted:
            (root / path).unlink()
            changed.append(path)
    return changed


def _present(root: Path) -> list[Path]:
    found = [*(root / SCHEMAS).glob("*.json"), *(root / PROTOS).glob("*.proto"), *(root / reference_pages.PAGES).glob("*.md")]
    return sorted(path.relative_to(root) for path in found)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kernelm_cli.reference", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("write", "check"))
    if parser.parse_args(arguments).action == "write":
        for path in write():
            print(path)
        return 0
    if problems := stale():
        print(*problems, "  remedy: python -m kernelm_cli.reference write", sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
