"""/docs: the OpenAPI document as one page. It is rendered here and loads nothing from elsewhere, so that it shows without
Internet and no stranger's script runs on a page where people try out their keys. /docs/openapi.json is the document itself."""

import re
from collections.abc import Iterator
from html import escape
from typing import Any

import msgspec

TITLES = {"text/event-stream": "Answer, each event"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark; }
section { border: 1px solid #8886; border-radius: .5rem; margin: 1rem 0; padding: .25rem 1rem 1rem; }
h2 code { font-size: 1.1rem; } b { color: #2563eb; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; overflow-wrap: anywhere; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8883; }
""".strip()


def render(document: dict[str, Any]) -> str:
    """The page for an OpenAPI document."""
    return "\n".join(_page(document))


def _page(document: dict[str, Any]) -> Iterator[str]:
    info, schemas = document["info"], document.get("components", {}).get("schemas", {})
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])} API</title><style>{STYLE}</style>'
    yield f'<h1>{escape(info["title"])} API</h1><p>{_prose(info.get("description", ""))}</p>'
    yield "<p>Authentication: <code>Authorization: Bearer km_&lt;id&gt;_&lt;secret&gt;</code>; "
    yield "<code>kernelm key create</code> makes a key. "
    yield 'Machines read <a href="/docs/openapi.json">openapi.json</a>.</p>'
    for path, item in document["paths"].items():
        for verb, operation in item.items():
            yield from _operation(verb, path, operation, schemas)
    yield "<h1>Types</h1>"
    for name, schema in sorted(schemas.items()):
        if "properties" in schema:
            yield f'<section id="{escape(name)}"><p>{_prose(schema.get("description", ""))}</p>'
            yield from _fields(name, schema, schemas)
            yield "</section>"
    yield "</html>"


def _operation(verb: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    yield f"<section><h2><b>{escape(verb.upper())}</b> <code>{escape(path)}</code></h2>"
    yield f"<p>{_prose(operation.get('description') or operation.get('summary', ''))}</p>"
    if parameters := operation.get("parameters"):
        rows = ((p["name"], {"description": p.get("description", ""), **p["schema"]}, p.get("required", False)) for p in parameters)
        yield from _table("Parameters", rows, schemas)
    body = operation.get("requestBody", {}).get("content", {})
    for title, content in (("Request", body), ("Answer", operation.get("responses", {}).get("200", {}).get("content", {}))):
        for kind, media in content.items():
            yield from _fields(TITLES.get(kind, title), _resolve(media["schema"], schemas), schemas)
    yield "</section>"


def _prose(text: str) -> str:
    """What stands between backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _fields(title: str, schema: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    required = schema.get("required", [])
    yield from _table(title, ((n, s, n in required) for n, s in schema.get("properties", {}).items()), schemas)


def _table(title: str, rows: Iterator[tuple[str, dict[str, Any], bool]], schemas: dict[str, Any]) -> Iterator[str]:
    yield f"<h3>{escape(title)}</h3><table><tr><th>field<th>type<th>default</tr>"
    types = re.compile(rf"\b({'|'.join(name for name, schema in schemas.items() if 'properties' in schema) or '(?!)'})\b")
    for name, schema, required in rows:
        default = "required" if required else msgspec.json.encode(schema["default"]).decode() if "default" in schema else ""
        kind = types.sub(r'<a href="#\1">\1</a>', escape(_type(schema, schemas)))
        about = f": {_prose(schema['description'])}" if schema.get("description") and "$ref" not in schema else ""
        yield f"<tr><td><code>{escape(name)}</code><td>{kind}{about}<td>{escape(default)}</tr>"
    yield "</table>"


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref", "")
    resolved: dict[str, Any] = schemas[reference.rpartition("/")[2]] if reference else schema
    return resolved


def _type(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A type in a few words: `list of string`."""
    if "$ref" in schema:
        return str(_resolve(schema, schemas).get("title", schema["$ref"].rpartition("/")[2]))
    if options := schema.get("oneOf") or schema.get("anyOf"):
        return " or ".join(_type(option, schemas) for option in options)
    if "enum" in schema:
        return " or ".join(msgspec.json.encode(value).decode() for value in schema["enum"])
    if "const" in schema:
        return msgspec.json.encode(schema["const"]).decode()
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'], schemas)}" if "items" in schema else "list"
    return str(schema.get("type", "any"))
