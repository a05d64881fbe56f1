"""What a contract's source says of its structs: the comment behind each field, its unit, its type in words.

msgspec structs carry no comments, so these are read from the source that declares them, with `ast` (where a field is) and
`tokenize` (what stands there). To a field belong the comment behind it, which may go on in the next line, indented further
than the field, and comment lines right above it.
"""

import ast
import functools
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from typing import Any, Literal

import msgspec

TIMES = "now|begun|created|expires|submitted|started|finished|heard|until|since|when|deadline|stopping|checkpointed"
UNITS = tuple((re.compile(pattern), unit) for pattern, unit in (  # by a field's name; kernelm_sdk.system says so
    (r"_per_s$", "1/s"), (r"_ms$", "ms"), (r"_s$", "s"), (f"^({TIMES})$", "Unix seconds"),
    (r"(^|_)cpu$", "cores"), (r"_mb$", "MB (2^20 bytes)"), (r"(^|_)bytes$", "bytes"), (r"(^|_)pids$", "processes"),
    (r"(^|_)gpus$", "accelerators"), (r"(^|_)tokens(_in|_out)?$", "tokens"), (r"(^|_)documents", "documents"),
    (r"^(accuracy|macro_\w+|fraction)$", "0 to 1"),
))  # fmt: skip


class Field(msgspec.Struct, frozen=True):
    """One field, for a row of a table."""

    name: str  # as it is in JSON
    type: str
    default: str  # JSON, "" where it is required
    unit: str
    text: str  # the comment


def structs_of(kinds: typing.Iterable[type]) -> list[type[msgspec.Struct]]:
    """These and all that occur in them, each once, in the order in which one meets them."""
    found: dict[type[msgspec.Struct], None] = {}

    def visit(kind: Any) -> None:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if kind in found:
                return
            found[kind] = None
            for hint in _hints(kind).values():
                visit(hint)
        for inner in typing.get_args(kind):
            visit(inner)

    for kind in kinds:
        visit(kind)
    return list(found)


def fields_of(kind: type[msgspec.Struct]) -> list[Field]:
    """Its fields, those of its bases included."""
    hints, texts = _hints(kind), comments(kind)
    rows = []
    for field in msgspec.structs.fields(kind):
        default = ""
        if field.default is not msgspec.NODEFAULT:
            default = msgspec.json.encode(field.default).decode()
        elif field.default_factory is not msgspec.NODEFAULT:
            default = msgspec.json.encode(field.default_factory()).decode()
        unit = next((u for pattern, u in UNITS if pattern.search(field.name)), "") if _numbers(hints[field.name]) else ""
        rows.append(Field(field.encode_name, in_words(hints[field.name]), default, unit, texts.get(field.name, "")))
    return rows


def bare_numbers(kind: type[msgspec.Struct]) -> list[str]:
    """Numbers that are no counts, and of which neither the name nor a comment says what they measure."""
    hints = {f.encode_name: _hints(kind)[f.name] for f in msgspec.structs.fields(kind)}
    plain = [f for f in fields_of(kind) if typing.get_origin(hints[f.name]) is not dict]  # whose keys are free, and name units
    return [f.name for f in plain if _numbers(hints[f.name], (float,)) and not (f.unit or f.text)]


def _hints(kind: type[msgspec.Struct]) -> dict[str, Any]:
    known = {f.name for f in msgspec.structs.fields(kind)}
    return {name: hint for name, hint in typing.get_type_hints(kind).items() if name in known}


def _numbers(hint: Any, kinds: tuple[type, ...] = (int, float)) -> bool:
    inner = () if typing.get_origin(hint) is Literal else typing.get_args(hint)
    return hint in kinds or any(_numbers(i, kinds) for i in inner)


def in_words(hint: Any) -> str:
    """A type, in Markdown: structs are links to their own heading."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return f"[{hint.__name__}](#struct-{hint.__name__.lower()})"
    if origin is Literal:
        return ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(in_words(i) for i in inner)
    if origin in (tuple, list):
        if origin is list or inner[1:] == (Ellipsis,):
            return f"list of {in_words(inner[0])}"
        return f"list of {', '.join(map(in_words, inner))}"
    if origin is dict:
        return f"object: {in_words(inner[0])} to {in_words(inner[1])}"
    return {str: "string", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value",
            msgspec.Raw: "any value"}.get(hint, getattr(hint, "__name__", str(hint)))  # fmt: skip


def comments(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Field -> the comment behind it, of the struct and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, msgspec.Struct) and not base.__module__.startswith("msgspec"):
            found |= _own_comments(base)
    return found


@functools.cache
def _own_comments(kind: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(kind))
    remarks = {token.start: token.string.lstrip("# ").rstrip() for token in tokenize.generate_tokens(io.StringIO(source).readline)
               if token.type == tokenize.COMMENT}  # fmt: skip
    behind = {line: (column, text) for (line, column), text in remarks.items()}
    lines, declared = source.splitlines(), ast.parse(source).body[0]
    assert isinstance(declared, ast.ClassDef)

    def alone(line: int, field: ast.AnnAssign) -> bool | None:
        """Whether a line has a comment and nothing else, which begins where the field does; None if it begins further in."""
        if line not in behind or not lines[line - 1].lstrip().startswith("#"):
            return False
        return True if behind[line][0] == field.col_offset else None

    found = {}
    for statement in declared.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            first, last, parts = statement.lineno, statement.end_lineno or statement.lineno, list[str]()
            while alone(first - 1, statement):
                first -= 1
            above = " ".join(behind[line][1] for line in range(first, statement.lineno))
            if last in behind:
                parts.append(behind[last][1])
                while alone(last + 1, statement) is None:
                    last += 1
                    parts.append(behind[last][1])
            if text := "; ".join(filter(None, [above, " ".join(parts)])):
                found[statement.target.id] = text
    return found
