"""HTTP: OpenAI's form where OpenAI has one, the contracts' own structs elsewhere.

Source: OpenAI API reference, "Embeddings" and "Models".
"""

import base64
import logging
import struct
from typing import Annotated, Any, Literal

import msgspec
from litestar import Litestar, MediaType, Request, Response, Router, get, post
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers import BaseRouteHandler
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from kernelm_contracts.jobs import JobList, JobQuery, Jobs, RunName, RunView
from kernelm_contracts.server import ClassifyReply, ClassifyRequest, EmbedReply, EmbedRequest, Server
from kernelm_gateway import docs_page, faults, management, openapi
from kernelm_gateway.gate import Gate
from kernelm_gateway.usage import Usage
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import ClientFault, Fault, invalid
from kernelm_sdk.system import Instance, Key, Route

log = logging.getLogger("kernelm.gateway")
CLASSIFY, EMBED, FIND, GET_RUN = map(method_of, (Server.classify, Server.embed, Jobs.find, Jobs.get_run))
Natural = Annotated[int, msgspec.Meta(ge=0)]
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}  # of what Litestar refuses by itself


class ClassifyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to classify, and by which deployment."""

    model: str
    input: str | list[str]
    top: Natural = 0  # the best so many labels a text; 0 for all
    at_least: Natural = 0  # refuse with 409 if the deployment's generation is lower


class EmbeddingsBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's request; `dimensions` is not supported, `user` is not used."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"  # base64: of little-endian float32
    dimensions: int | None = None
    user: str = ""
    at_least: Natural = 0


class Embedding(msgspec.Struct, frozen=True):
    index: int
    embedding: tuple[float, ...] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, frozen=True):
    """OpenAI's answer, and which generation and artifact gave it."""

    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    generation: int
    artifact: str  # digest
    object: Literal["list"] = "list"


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


class DeploymentList(msgspec.Struct, frozen=True):
    deployments: list[Deployment]


class Health(msgspec.Struct, frozen=True):
    status: Literal["ok"]


@post("/classify", status_code=200)
async def classify(request: Request[Any, Any, Any], data: JSONBody[ClassifyBody]) -> ClassifyReply:
    """The labels of each text with their probabilities, best first."""
    body = ClassifyRequest(_texts(data.input), data.model, data.top, data.at_least)
    reply: ClassifyReply = await _gate(request).call(request.state.key, CLASSIFY, body, data.model)
    return reply


@post("/embeddings", status_code=200)
async def embeddings(request: Request[Any, Any, Any], data: JSONBody[EmbeddingsBody]) -> Embeddings:
    """A vector of unit length for each text."""
    if data.dimensions is not None:
        raise ClientFault("invalid", "dimensions: a model has one size only", "leave `dimensions` out", param="dimensions")
    body = EmbedRequest(_texts(data.input), data.model, data.at_least)
    reply: EmbedReply = await _gate(request).call(request.state.key, EMBED, body, data.model)
    form = _base64 if data.encoding_format == "base64" else tuple
    return Embeddings([Embedding(index, form(row)) for index, row in enumerate(reply.embeddings)], reply.model,
                      EmbeddingsUsage(reply.tokens, reply.tokens), reply.generation, reply.artifact)  # fmt: skip


@get("/models")
async def models(request: Request[Any, Any, Any]) -> ModelList:
    """The deployments that the key was granted."""
    routes = await _gate(request).deployments(request.state.key)
    return ModelList([Model(route.name, route.generation, route.artifact) for route in routes])


@get("/deployments")
async def deployments(request: Request[Any, Any, Any]) -> DeploymentList:
    """The deployments that the key was granted, with the pools and instances behind each."""
    state = await _gate(request).state()
    routes = _gate(request).visible(request.state.key, state)
    pools = {route.name: {to.pool for to in route.to} for route in routes}
    return DeploymentList([Deployment(r, tuple(i for i in state.instances if i.pool in pools[r.name])) for r in routes])


@get("/jobs")
async def jobs(request: Request[Any, Any, Any], job_state: Annotated[str, QueryParameter(name="state")] = "",
               run: FromQuery[str] = "", limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100) -> JobList:  # fmt: skip
    """The jobs of the key's tenant, optionally only those in one `state` or of one `run`."""
    reply: JobList = await _gate(request).call(request.state.key, FIND, JobQuery(job_state, run, limit))
    return reply


@get("/runs/{run_id:str}")
async def get_run(request: Request[Any, Any, Any], run_id: FromPath[str]) -> RunView:
    """A run of the key's tenant, with its jobs."""
    reply: RunView = await _gate(request).call(request.state.key, GET_RUN, RunName(run_id))
    return reply


@get("/usage", sync_to_thread=False)
def usage(request: Request[Any, Any, Any]) -> Usage:
    """What the key's tenant has used since this gateway started."""
    return _gate(request).meter.of(request.state.key.tenant)


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


async def authenticate(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """A guard: runs before anything of the body is read, and leaves the key in the request's state."""
    key: Key = await connection.app.state.gate.identify(connection.headers.get("authorization", ""))
    connection.state.key = key


def make_app(gate: Gate) -> Litestar:
    """The ASGI application in front of `gate`."""
    own = [classify, embeddings, models, deployments, jobs, get_run, usage]
    v1 = Router("/v1", route_handlers=[*own, *management.handlers()], guards=[authenticate])
    app = Litestar([v1, healthz, docs, openapi_json], openapi_config=None, logging_config=None,
                   request_max_body_size=gate.settings.max_body_bytes, exception_handlers={Exception: refuse})  # fmt: skip
    app.state.gate, app.state.openapi = gate, openapi.describe(app)
    return app


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
        where = str(first.get("key", ""))
        return ClientFault("invalid", f"{where or 'the request'}: {first.get('message', error.detail)}", "see /docs", param=where)
    if isinstance(error, HTTPException) and error.status_code < 500:
        limit = request.app.state.gate.settings.max_body_bytes
        remedy = f"send at most {limit} bytes a request, in several requests" if error.status_code == 413 else "see /docs"
        return ClientFault(CODES.get(error.status_code, "invalid"), error.detail, remedy)
    log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
    return faults.of_bug()


def _gate(request: Request[Any, Any, Any]) -> Gate:
    gate: Gate = request.app.state.gate
    return gate


def _texts(given: str | list[str]) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given)
    if not texts:
        raise invalid("input", ValueError("there is no text in it"), "send a text or a list of texts")
    return texts


def _base64(row: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()
