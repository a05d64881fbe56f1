"""The OpenAPI 3.1 document of the application, from its routes and msgspec's schemas: those of the contracts, word for word.

Litestar's own generator fails on a struct whose default can't be hashed (`JobRecord.progress`), as of 2.25.
Source: OpenAPI Specification 3.1.0, whose schemas are JSON Schema 2020-12.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from kernelm_gateway.exchange import LONGEST_S
from kernelm_gateway.faults import ErrorBody
from kernelm_gateway.feed import EventMessage, events
from kernelm_gateway.front import EVENTS, Endpoint
from kernelm_gateway.redaction import PARTS

TEXT = "Deployed models over HTTP. The same calls exist over gRPC (reflection is on) and over NATS."
STREAM = "text/event-stream"
BEARER = {"type": "http", "scheme": "bearer", "bearerFormat": "km_<id>_<secret>"}


def describe(app: Litestar, endpoints: Iterable[Endpoint] = ()) -> dict[str, Any]:
    """`endpoints`, and every route that answers with a struct. `security=[]` on a handler: it needs no key."""
    front = tuple(endpoints)
    routes = [route for route in app.routes if isinstance(route, HTTPRoute)]
    shown = [(route.path_format, handler) for route in routes for handler in route.route_handlers
             if _is_struct(handler.parsed_return_field.annotation)]  # fmt: skip
    kinds: dict[Any, None] = {ErrorBody: None}
    for _, handler in shown:
        kinds |= dict.fromkeys((handler.parsed_return_field.annotation, *filter(None, [_body(handler)])))
    kinds |= dict.fromkeys(kind for e in front for kind in (e.takes, e.gives, *filter(None, [e.streams])))
    kinds[EventMessage] = None
    refs, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(kinds, refs, strict=True))
    paths: dict[str, Any] = {endpoint.path: {"post": _of_endpoint(endpoint, schemas)} for endpoint in front}
    paths[EVENTS] = {"get": _of_events(schemas)}
    for path, handler in shown:
        for verb in sorted(handler.http_methods & {"GET", "POST"}):
            paths.setdefault(path, {})[verb.lower()] = _operation(path, handler, schemas)
    return {
        "openapi": "3.1.0", "info": {"title": "kernelm", "version": "1", "description": TEXT}, "security": [{"key": []}],
        "paths": paths, "components": {"schemas": components, "securitySchemes": {"key": BEARER}},
    }  # fmt: skip


def _of_endpoint(endpoint: Endpoint, schemas: dict[Any, Any]) -> dict[str, Any]:
    name = endpoint.path.removeprefix("/v1/").replace("/", "_")
    operation = _described(name, endpoint.about, endpoint.takes, endpoint.gives, schemas)
    if endpoint.streams:
        operation["responses"]["200"]["content"][STREAM] = {"schema": schemas[endpoint.streams]}
    within = {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_S}
    return operation | {"parameters": [
        _header("Kernelm-Timeout", within, "seconds within which the whole answer is wanted"),
        _header("Kernelm-Redact", {"enum": [part for part in PARTS if part]}, "where private data is taken out"),
    ]}  # fmt: skip


def _header(name: str, schema: dict[str, Any], about: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": about}


def _of_events(schemas: dict[Any, Any]) -> dict[str, Any]:
    operation = _described("events", inspect.getdoc(events), None, None, schemas)
    operation["responses"]["200"]["content"] = {STREAM: {"schema": schemas[EventMessage]}}
    types = {"type": "array", "items": {"type": "string"}}
    return operation | {"parameters": [
        {"name": "type", "in": "query", "required": False, "schema": types},
        _header("Last-Event-ID", {"type": "string"}, "the id of the last event that was heard: those behind it come first"),
    ]}  # fmt: skip


def _described(name: str, about: str | None, takes: Any, gives: Any, schemas: dict[Any, Any]) -> dict[str, Any]:
    def content(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": schemas[kind]}}

    operation: dict[str, Any] = {
        "operationId": name, "summary": about,
        "responses": {"200": {"description": "the answer", "content": content(gives) if gives else {}},
                      "default": {"description": "what was wrong, and the remedy", "content": content(ErrorBody)}},
    }  # fmt: skip
    if takes is not None:
        operation["requestBody"] = {"required": True, "content": content(takes)}
    return operation


def _operation(path: str, handler: HTTPRouteHandler, schemas: dict[Any, Any]) -> dict[str, Any]:
    operation = _described(handler.handler_name, inspect.getdoc(handler.fn), _body(handler),
                           handler.parsed_return_field.annotation, schemas)  # fmt: skip
    if parameters := [_parameter(path, name, field) for name, field in handler.parsed_fn_signature.parameters.items()
                      if name not in ("request", "data")]:  # fmt: skip
        operation["parameters"] = parameters
    if handler.security is not None:
        operation["security"] = list(handler.security)
    return operation


def _parameter(path: str, name: str, field: Any) -> dict[str, Any]:
    in_path = f"{{{name}}}" in path
    schema = msgspec.json.schema(field.annotation)
    for ours, theirs in (("minimum", "ge"), ("maximum", "le")):
        if (bound := getattr(field.kwarg_definition, theirs, None)) is not None:
            schema[ours] = bound
    if not in_path:
        schema["default"] = field.default
    name = getattr(field.kwarg_definition, "name", None) or name
    return {"name": name, "in": "path" if in_path else "query", "required": in_path, "schema": schema}


def _body(handler: HTTPRouteHandler) -> Any:
    field = handler.parsed_fn_signature.parameters.get("data")
    return field.annotation if field else None


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
