"""The OpenAPI 3.1 document of the application, from its routes and msgspec's schemas: those of the contracts, word for word.

Litestar's own generator fails on a struct whose default can't be hashed (`JobRecord.progress`), as of 2.25.
Source: OpenAPI Specification 3.1.0, whose schemas are JSON Schema 2020-12.
"""

import inspect
from typing import Any

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from kernelm_gateway.faults import ErrorBody

TEXT = "Deployed models over HTTP. The same calls exist over gRPC (reflection is on) and over NATS."
BEARER = {"type": "http", "scheme": "bearer", "bearerFormat": "km_<id>_<secret>"}


def describe(app: Litestar) -> dict[str, Any]:
    """Every route that answers with a struct. `security=[]` on a handler: it needs no key."""
    routes = [route for route in app.routes if isinstance(route, HTTPRoute)]
    shown = [(route.path_format, handler) for route in routes for handler in route.route_handlers
             if _is_struct(handler.parsed_return_field.annotation)]  # fmt: skip
    kinds: dict[Any, None] = {ErrorBody: None}
    for _, handler in shown:
        kinds |= dict.fromkeys((handler.parsed_return_field.annotation, *filter(None, [_body(handler)])))
    refs, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(kinds, refs, strict=True))
    paths: dict[str, Any] = {}
    for path, handler in shown:
        for verb in sorted(handler.http_methods & {"GET", "POST"}):
            paths.setdefault(path, {})[verb.lower()] = _operation(path, handler, schemas)
    return {
        "openapi": "3.1.0", "info": {"title": "kernelm", "version": "1", "description": TEXT}, "security": [{"key": []}],
        "paths": paths, "components": {"schemas": components, "securitySchemes": {"key": BEARER}},
    }  # fmt: skip


def _operation(path: str, handler: HTTPRouteHandler, schemas: dict[Any, Any]) -> dict[str, Any]:
    def content(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": schemas[kind]}}

    operation: dict[str, Any] = {
        "operationId": handler.handler_name, "summary": inspect.getdoc(handler.fn),
        "responses": {"200": {"description": "the answer", "content": content(handler.parsed_return_field.annotation)},
                      "default": {"description": "what was wrong, and the remedy", "content": content(ErrorBody)}},
    }  # fmt: skip
    if (body := _body(handler)) is not None:
        operation["requestBody"] = {"required": True, "content": content(body)}
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
