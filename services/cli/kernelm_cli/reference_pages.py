"""A page for each contract: methods with real examples, structs with units, events, subjects, permissions, faults.

All of it is derived: signatures and docstrings, field comments (reference_fields.py), faults from the source that raises them
(by `ast`: nothing is run), examples from what a running system has exchanged (reference_examples.py recorded it).
"""

import ast
import functools
import importlib
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from kernelm_authority.identity import DENIED, SERVICES, Grant, permissions
from kernelm_cli.reference_fields import Field, fields_of, in_words, structs_of
from kernelm_sdk import errors, system
from kernelm_sdk.contract import Contract, Method

PAGES = Path("plugins/contracts/reference")
EXAMPLES = "examples"
# what every call can be answered with, whoever answers: the SDK's own serving, calling and running
EVERYWHERE = ("kernelm_sdk.serving", "kernelm_sdk.bus", "kernelm_sdk.runner", "kernelm_sdk.jobs")
KINDS = {"unary": "one request, one answer", "streamed": "one request, a stream of answers; the last message is empty",
         "job": "a job: answered `{}` at once, and reported on through [`work/1`](work.v1.md) until it is over"}  # fmt: skip


class Example(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was sent and came back. Of a stream: its first answer; of a job: its result."""

    request: Any
    reply: Any = None
    fault: Any = None


class Examples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`examples/<contract>.v<major>.json`."""

    methods: dict[str, Example] = {}
    events: dict[str, Any] = {}


def page_of(contract: type[Contract]) -> Path:
    return PAGES / f"{contract.name}.v{contract.major}.md"


def read_examples(contract: type[Contract], root: Path) -> Examples:
    """Those that were recorded; none for a contract that is new."""
    file = root / PAGES / EXAMPLES / f"{contract.name}.v{contract.major}.json"
    return msgspec.json.decode(file.read_bytes(), type=Examples) if file.is_file() else Examples()


def pages(contracts: list[type[Contract]], root: Path) -> dict[Path, str]:
    """Every page, and the one that lists them: path from the repository's root -> text."""
    found = {page_of(c): "\n".join(_page(c, read_examples(c, root))) + "\n" for c in contracts}
    return found | {PAGES / "README.md": "\n".join(_index(contracts)) + "\n"}


def _index(contracts: list[type[Contract]]) -> Iterator[str]:
    yield from ("# Reference of the contracts", "", "Derived by `python -m kernelm_cli.reference write`; do not edit.",
                "`examples/` is what a running system has exchanged; `python -m kernelm_cli.reference_examples` records it anew.",
                "How a call is made, and what a stream is: [`kernel/PROTOCOL.md`](../../../kernel/PROTOCOL.md).", "",
                "| contract | | methods |", "|---|---|---|")  # fmt: skip
    for contract in contracts:
        methods = ", ".join(f"[`{m}`]({page_of(contract).name}#{m})" for m in contract.methods)
        yield f"| [`{contract.id()}`]({page_of(contract).name}) | {_cell(_doc(contract))} | {methods} |"
    yield from ("", "## Faults", "", "A fault is the answer with a body as below, and the headers `Nats-Service-Error` and "
                "`Nats-Service-Error-Code`.", "`client`: correct the request. `plugin`, `kernel`: not the caller's matter; with "
                "`retriable` the same request may succeed soon.", "")  # fmt: skip
    yield from _table(fields_of(errors.FaultBody))
    yield from ("", "Whatever is called, these can be the answer:", "")
    yield from _faults(EVERYWHERE)


def _page(contract: type[Contract], examples: Examples) -> Iterator[str]:
    module = importlib.import_module(contract.__module__)
    schema = f"../schemas/{contract.name}.v{contract.major}.json"
    yield from (f"# `{contract.id()}`", "", _doc(contract), "",
                f"Declared in `{contract.__module__}`; JSON Schema: [`{Path(schema).name}`]({schema}), hash "
                f"`{contract.schema_hash()}`.", "")  # fmt: skip
    about = _doc(module)
    if about.count("\n") > 1:
        yield from ("```text", about, "```", "")
    yield from ("| method | what |", "|---|---|")
    yield from (f"| [`{m.name}`](#{m.name}) | {_cell(m.doc.splitlines()[0] if m.doc else '')} |" for m in contract.methods.values())
    yield from ("", "## Methods", "")
    for method in contract.methods.values():
        yield from _method(method, examples.methods.get(method.name))
    yield from ("## Events", "")
    if not contract.events:
        yield from ("None.", "")
    for event in contract.events:
        yield from (f"### {event.TYPE}", "", _doc(event), "", f"On `evt.{event.TYPE}.<source>`; permission: every "
                    "plugin and service may publish events under its own name.", "")  # fmt: skip
        yield from _table(fields_of(event))
        yield from ("", *_json("an event", examples.events.get(event.TYPE)))
    yield from ("## Structs", "")
    for kind in structs_of(t for m in contract.methods.values() for t in (m.request, m.reply)):
        yield from (f"### struct {kind.__name__}", "", *([_doc(kind), ""] if _doc(kind) else []))
        if kind.__struct_config__.forbid_unknown_fields:
            yield from ("Unknown fields are refused.", "")
        if kind.__struct_config__.array_like:
            yield from ("Written as an array, in this order.", "")
        yield from _table(fields_of(kind))
        yield ""
    yield from ("## Faults", "")
    if contract.id() not in IMPLEMENTED:
        yield "Those of [every call](README.md#faults), those that are named above, and what else the plugin tells its callers."
        return
    codes = sorted({(whose, f"`{code}`") for package in IMPLEMENTED[contract.id()] for code, whose, _ in _raised(package)})
    yield from ("Those of [every call](README.md#faults), and:", "")
    for whose in ("client", "plugin", "kernel"):
        yield f"- {whose}: {', '.join(code for by, code in codes if by == whose) or 'none'}"


def _method(method: Method, example: Example | None) -> Iterator[str]:
    yield from (f"### {method.name}", "", *([method.doc, ""] if method.doc else []))
    reply = in_words(method.reply)
    yield from ("| | |", "|---|---|", f"| kind | {KINDS[method.kind]} |", f"| request | {in_words(method.request)} |",
                f"| {'result' if method.kind == 'job' else 'answer'} | {reply} |", *_subjects(method), "")  # fmt: skip
    if example is not None:
        yield from _json("request", example.request)
        if example.fault is not None:
            yield from _json("fault", example.fault)
        else:
            yield from _json("result" if method.kind == "job" else "answer", example.reply)


def _subjects(method: Method) -> Iterator[str]:
    """Rows: where it is called, who may, where it is served."""
    tail = f"{method.contract.name}.v{method.contract.major}.{method.name}"
    if method.contract is system.Lifecycle:
        yield f"| called on | `inst.<instance>.{tail}.<caller>` |"
        yield "| permission | the kernel and administrators |"
        return
    if method.kind == "job":
        yield f"| handed over on | `inst.<instance>.{tail}.jobs` |"
        yield "| permission | the job table alone; submit it with [`jobs/1.submit`](jobs.v1.md#submit) or in a run |"
        return
    subjects = [f"`svc.{tail}.<caller>`"] + ([f"`model.<deployment>.{method.name}.<caller>`"] if method.scope == "model" else [])
    yield f"| called on | {', '.join(subjects)}; of one instance `inst.<instance>.{tail}.<caller>` |"
    yield f"| served on | `impl.<pool>.{tail}.<caller>` |"
    yield f"| permission | {'; '.join(_who(method, f'svc.{tail}.me'))} |"


def _who(method: Method, subject: str) -> Iterator[str]:
    """Who may call it, as the broker is told (kernelm_authority.identity)."""

    def may(role: str, name: str = "me") -> bool:
        allowed, _ = permissions(Grant(role, name))
        return any(_covers(pattern, f"{subject.rpartition('.')[0]}.{name}") for pattern in allowed)

    if may("join"):
        yield "whoever holds a join token"
    elif method.contract.id() == "kernel/1" and method.name in DENIED:
        yield "administrators alone"
    elif may("plugin"):
        yield "every plugin and every service"
    else:
        yield f'administrators; a plugin by `calls = ["{method.contract.id()}.{method.name}"]` in its manifest'
        if services := [name for name in SERVICES if may("service", name)]:
            yield f"the services {', '.join(services)}"
    if method.scope == "model":
        yield f"a key by its `models` and `methods` (`{method.name}`)"


def _covers(pattern: str, subject: str) -> bool:
    """Whether a NATS subject is one of a pattern's."""
    parts, tokens = pattern.split("."), subject.split(".")
    if parts[-1] == ">":
        return len(tokens) >= len(parts) and _covers(".".join(parts[:-1]), ".".join(tokens[: len(parts) - 1]))
    return len(parts) == len(tokens) and all(p in ("*", t) for p, t in zip(parts, tokens, strict=True))


def _table(fields: list[Field]) -> Iterator[str]:
    if not fields:
        yield "No fields."
        return
    yield from ("| field | type | default | unit | |", "|---|---|---|---|---|")
    for f in fields:
        default = f"`{f.default}`" if f.default else "required"
        yield f"| `{f.name}` | {_cell(f.type)} | {_cell(default)} | {f.unit} | {_cell(f.text)} |"


def _doc(what: Any) -> str:
    """Its own docstring: `inspect.getdoc` would give a struct that of msgspec's base."""
    return inspect.cleandoc(vars(what).get("__doc__") or "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _json(what: str, value: Any) -> list[str]:
    if value is None:
        return []
    return [f"{what}", "", "```json", json.dumps(value, indent=2, ensure_ascii=False), "```", ""]


# ---- faults, as the source raises them ----

# where the one implementation of each of the system's own contracts raises faults; what others answer is each plugin's affair
IMPLEMENTED = {"kernel/1": ("kernelm", "kernelm_sdk.transitions"), "node/1": ("kernelm_node",),
               "artifacts/1": ("kernelm_artifacts",), "jobs/1": ("kernelm_jobs", "kernelm_sdk.transitions"),
               "work/1": ("kernelm_jobs.reports",), "plugin/1": ("kernelm_sdk.jobs",)}  # fmt: skip


def _faults(packages: Iterable[str]) -> Iterator[str]:
    rows = sorted({row for package in packages for row in _raised(package)})
    yield from ("| code | whose | for example |", "|---|---|---|")
    seen = set()
    for code, whose, message in rows:
        if (code, whose) not in seen:
            seen.add((code, whose))
            yield f"| `{code}` | {whose} | {_cell(message)} |"


@functools.cache
def _raised(package: str) -> frozenset[tuple[str, str, str]]:
    """(code, whose, message) of every `ClientFault("code", "message")` and the like in a package, or a module."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return frozenset()
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    found = set()
    for file in (f for f in files if not {"testing", "tests"} & set(f.parts)):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Fault") and \
                    len(node.args) > 1 and isinstance(node.args[0], ast.Constant):  # fmt: skip
                whose = node.func.id.removesuffix("Fault").lower()
                if whose in ("client", "plugin", "kernel"):
                    found.add((str(node.args[0].value), whose, _wording(node.args[1])))
    return frozenset(found)


def _wording(node: ast.expr) -> str:
    """A message, with `...` in the place of what is only known when it is raised."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values]
        return textwrap.shorten("".join(parts), 160, placeholder=" ...")
    return ""
