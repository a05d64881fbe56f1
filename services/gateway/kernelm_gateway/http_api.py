"""HTTP: what is not a call of a model (those are in front.py): models, management, documents;
jobs and runs are in jobs_api.py. OpenAI's form where
OpenAI has one, the contracts' own structs elsewhere.

Source: OpenAI API reference, "Models".
"""

import logging
from typing import Any, Literal

import msgspec
from litestar import Litestar, MediaType, Request, Response, Router, get
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException, SerializationException, ValidationException
from litestar.handlers import BaseRouteHandler
from litestar.params import FromPath, FromQuery

from kernelm_contracts.shadows import Shadow
from kernelm_contracts.usage import UsageQuery, UsageReport
from kernelm_gateway import docs_page, faults, jobs_api, management, openapi
from kernelm_gateway.front import ENDPOINTS, Front
from kernelm_gateway.gate import USAGE, Gate, unknown_model
from kernelm_gateway.metrics import CONTENT_TYPE
from kernelm_sdk.errors import ClientFault, Fault
from kernelm_sdk.system import Instance, Key, Route

log = logging.getLogger("kernelm.gateway")
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}  # of what Litestar refuses by itself


class Model(msgspec.Struct, frozen=True):
    """OpenAI's form; `created` is left out, since a route does not record it."""

    id: str
    generation: int
    artifact: str  # digest
    owned_by: str = "kernelm"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, frozen=True):
    data: list[Model]
    object: Literal["list"] = "list"


class Deployment(msgspec.Struct, frozen=True):
    """A model's route, and the instances behind it."""

    route: Route
    instances: tuple[Instance, ...]
    shadow: Shadow | None = None  # the deployment that answers copies of its calls, and what came of them


class DeploymentList(msgspec.Struct, frozen=True):
    deployments: list[Deployment]


class Health(msgspec.Struct, frozen=True):
    status: Literal["ok"]


async def authenticate(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """A guard: runs before anything of the body is read, and leaves the key in the request's state."""
    key: Key = await connection.app.state.gate.arrive(lambda name: connection.headers.get(name, ""))
    connection.state.key = key


@get("/models")
async def models(request: Request[Any, Any, Any]) -> ModelList:
    """The deployments that the key was granted."""
    routes = await _gate(request).deployments(request.state.key)
    return ModelList([Model(route.name, route.generation, route.artifact) for route in routes])


@get("/models/{name:str}")
async def model(request: Request[Any, Any, Any], name: FromPath[str]) -> Model:
    """One of them."""
    routes = await _gate(request).deployments(request.state.key)
    for route in routes:
        if route.name == name:
            return Model(route.name, route.generation, route.artifact)
    raise unknown_model(name, [route.name for route in routes])


@get("/deployments")
async def deployments(request: Request[Any, Any, Any]) -> DeploymentList:
    """The deployments that the key was granted, with the pools and instances behind each."""
    state = await _gate(request).state()
    routes = _gate(request).visible(request.state.key, state)
    pools = {route.name: {to.pool for to in route.to} for route in routes}
    shadows = _gate(request).shadows.known
    return DeploymentList([Deployment(r, tuple(i for i in state.instances if i.pool in pools[r.name]), shadows.get(r.name))
                           for r in routes])  # fmt: skip


@get("/usage")
async def usage(request: Request[Any, Any, Any], since: FromQuery[str] = "", until: FromQuery[str] = "") -> UsageReport:
    """What the key's tenant has used from the day `since` (the first of this month) to `until` (today), over HTTP, gRPC and NATS,
    and what is left of its budgets."""
    reply: UsageReport = await _gate(request).call(request.state.key, USAGE, UsageQuery(since=since, until=until))
    return reply


@get("/metrics", guards=[authenticate], media_type=MediaType.TEXT)
async def metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
    """For Prometheus; with a key whose methods name "metrics", or an administrator's."""
    key: Key = request.state.key
    if not key.admin and "metrics" not in key.methods:
        raise ClientFault("permission_denied", f"API key {key.id} ({key.name}) may not read the metrics",
                          "`kernelm key create prometheus --methods metrics` makes one that may")  # fmt: skip
    return Response(await _gate(request).ledger.metrics.text(), media_type=CONTENT_TYPE)


@get("/healthz", security=[], sync_to_thread=False)
def healthz(request: Request[Any, Any, Any]) -> Health:
    """200 while the gateway is connected to the bus, else 503."""
    _gate(request).raise_if_disconnected()
    return Health("ok")


@get("/docs", media_type=MediaType.HTML, sync_to_thread=False)
def docs(request: Request[Any, Any, Any]) -> str:
    """The page for people."""
    return docs_page.render(request.app.state.openapi)


@get("/docs/openapi.json", sync_to_thread=False)
def openapi_json(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """The document for machines."""
    document: dict[str, Any] = request.app.state.openapi
    return document


def make_app(gate: Gate) -> Front:
    """The ASGI application in front of `gate`."""
    own = [models, model, deployments, usage, *jobs_api.HANDLERS]
    v1 = Router("/v1", route_handlers=[*own, *management.handlers()], guards=[authenticate])
    app = Litestar([v1, healthz, metrics, docs, openapi_json], openapi_config=None, logging_config=None,
                   request_max_body_size=gate.settings.max_body_bytes, exception_handlers={Exception: refuse})  # fmt: skip
    app.state.gate, app.state.openapi = gate, openapi.describe(app, ENDPOINTS)
    return Front(gate, app)


def refuse(request: Request[Any, Any, Any], error: Exception) -> Response[faults.ErrorBody]:
    """The answer to whatever went wrong, in OpenAI's form."""
    fault = _fault(request, error)
    status = faults.http_status(fault)
    if isinstance(error, HTTPException):
        status = error.status_code
    return Response(faults.http_body(fault), status_code=status, headers=faults.http_headers(fault), media_type=MediaType.JSON)


def _fault(request: Request[Any, Any, Any], error: Exception) -> Fault:
    if isinstance(error, Fault):
        return error
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        first: Any = error.extra[0]  # Litestar's: {"message": ..., "key": field}
        where = str(first.get("key", "")).removeprefix("data").lstrip(".")  # what Litestar's handlers call the body
        return ClientFault("invalid", f"{where or 'the request'}: {first.get('message', error.detail)}", "see /docs", param=where)
    if isinstance(error, HTTPException) and error.status_code < 500:
        limit = request.app.state.gate.settings.max_body_bytes
        remedy = f"send at most {limit} bytes a request, in several requests" if error.status_code == 413 else "see /docs"
        what, path = error.detail, request.url.path[:200]
        if isinstance(error.__cause__, SerializationException):
            what, remedy = f"the body is no JSON: {what}", "send an object in UTF-8"
        what = {404: f"there is no {path}", 405: f"{path} does not take {request.method}"}.get(error.status_code, what)
        return ClientFault(CODES.get(error.status_code, "invalid"), what, remedy)
    log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
    return faults.of_bug()


def _gate(request: Request[Any, Any, Any]) -> Gate:
    gate: Gate = request.app.state.gate
    return gate
