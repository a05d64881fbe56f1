"""Values inside a stage's `with`: walking them, and the references "${stage.field}" among them."""

import re
import typing
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal

import msgspec

from kernelm_sdk.errors import ClientFault

Where = tuple[str | int, ...]
REFERENCE = re.compile(r"\$\{([a-z0-9][a-z0-9-]*)\.([A-Za-z0-9_.]+)\}\Z")
DIGEST = "sha256:" + "0" * 64  # stands in for a digest that is not known yet
SAMPLES: dict[Any, Any] = {str: DIGEST, int: 1, float: 1.0, bool: True, tuple: [], list: [], dict: {}}


def leaves(value: Any, where: Where = ()) -> Iterator[tuple[Where, Any]]:
    """(place, value) of every scalar and of every table that names a source (`folder`, `package`)."""
    if isinstance(value, dict) and not {"folder", "package"} & value.keys():
        for key, inner in value.items():
            yield from leaves(inner, (*where, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*where, index))
    else:
        yield where, value


def put(tree: Any, where: Where, value: Any) -> None:
    """Set the value at a place of nested dicts and lists."""
    for key in where[:-1]:
        tree = tree[key]
    tree[where[-1]] = value


def get(tree: Any, field: str) -> Any:
    """The value at a dotted place as msgspec writes it ("candidates[1].train"), None where there is none."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", field):
        try:
            tree = tree[int(index)] if index else tree[name]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def dotted(where: Where) -> str:
    """The place as msgspec writes it."""
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in where).lstrip(".")


def stand_in(text: str, earlier: dict[str, Any]) -> Any:
    """A value of the type that the reference will have, so that the request can be checked before the run.

    `earlier`: stage -> struct of its result. ClientFault if the reference can't be resolved.
    """
    match = REFERENCE.match(text)
    if match is None:
        raise ClientFault("invalid_run_file", f"{text!r} is no reference", 'a reference is the whole value: "${stage.field}"')
    stage, path = match[1], match[2]
    if stage not in earlier:
        raise ClientFault("invalid_run_file", f"{text!r}: no earlier stage is called {stage!r}",
                          f"earlier stages: {', '.join(earlier) or 'none'}")  # fmt: skip
    kind = earlier[stage]
    for name in path.split("."):
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            return DIGEST if kind is Any else _sample(kind)
        fields = typing.get_type_hints(kind)
        names = [f.name for f in msgspec.structs.fields(kind)]
        if name not in names:
            raise ClientFault("invalid_run_file", f"{text!r}: the result of {stage!r} has no field {name!r}",
                              f"it has {', '.join(names)}")  # fmt: skip
        kind = fields[name]
    return _sample(kind)


def _sample(kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return typing.get_args(kind)[0]
    if origin is UnionType or origin is typing.Union:
        return _sample(typing.get_args(kind)[0])
    return SAMPLES.get(origin or kind, {})
