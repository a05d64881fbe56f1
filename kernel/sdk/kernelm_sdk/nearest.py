"""What somebody may have meant by a name that there is not."""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec.inspect

UNKNOWN = re.compile(r"unknown field `([^`]+)`(?: - at `\$([^`]*)`)?")  # as msgspec says it
STEP = re.compile(r"\.([^.\[\]]+)|\[[^\]]*\]")  # of its paths: `.field`, `[0]` in a list, `[...]` in a mapping


def hint(given: str, known: Iterable[str]) -> str:
    """For a remedy: the known name that `given` resembles, or all that there are."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(given, names, 1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names) or 'nothing'}"


def field_hint(error: Exception, wanted: Any) -> str:
    """For a remedy, where `error` is msgspec's of an unknown field in what should have been a `wanted`: the field that it
    resembles among those that there are in its place, however deep. "" where the error is another one."""
    if (found := UNKNOWN.search(str(error))) is None:
        return ""
    here = list(_alternatives(msgspec.inspect.type_info(wanted)))
    for step in STEP.finditer(found[2] or ""):
        here = [inner for type in here for inner in _within(type, step[1])]
    names = [field.encode_name for type in here if isinstance(type, msgspec.inspect.StructType) for field in type.fields]
    return hint(found[1], names) if names else ""


def _alternatives(type: msgspec.inspect.Type) -> Iterator[msgspec.inspect.Type]:
    if isinstance(type, msgspec.inspect.UnionType):
        for each in type.types:
            yield from _alternatives(each)
    else:
        yield type


def _within(type: msgspec.inspect.Type, field: str | None) -> Iterator[msgspec.inspect.Type]:
    """What stands in the field, or, without one, in any place of the collection."""
    if field is not None and isinstance(type, msgspec.inspect.StructType):
        for found in type.fields:
            if found.encode_name == field:
                yield from _alternatives(found.type)
    elif isinstance(type, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
        yield from _alternatives(type.item_type)
    elif isinstance(type, msgspec.inspect.TupleType):
        for item in type.item_types:
            yield from _alternatives(item)
    elif isinstance(type, msgspec.inspect.DictType):
        yield from _alternatives(type.value_type)
