"""The shape of structs that are kept on disk: a test that pins it beside a format number fails when one changes alone."""

import hashlib
from typing import Any

import msgspec


def shape(*structs: type[msgspec.Struct]) -> str:
    """16 hex digits that change with the structs' fields, their types and defaults, and with those of the structs in them; what
    is said of them does not count."""
    schemas, components = msgspec.json.schema_components(structs, ref_template="#/$defs/{name}")
    canonical = msgspec.json.encode(_without_words([schemas, components]), order="deterministic")
    return hashlib.sha256(canonical).hexdigest()[:16]


def _without_words(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_words(value) for key, value in node.items() if key != "description" or isinstance(value, dict)}
    return [_without_words(value) for value in node] if isinstance(node, list | tuple) else node
