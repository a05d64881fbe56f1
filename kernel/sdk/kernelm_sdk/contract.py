"""Contracts: declare a typed class once, derive everything else from it.

A contract is a subclass of `Contract` whose methods are marked `@unary`, `@streamed` or `@job`. Each takes one
`msgspec.Struct` and returns one (a stream yields many). From the class come the subjects, the JSON schemas, the schema
hash that the handshake compares, the permissions, and (in `kernelm_cli.reference`) AsyncAPI, .proto and pages.
"""

import hashlib
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from kernelm_sdk.events import Event

Kind = Literal["unary", "streamed", "job"]
Scope = Literal["svc", "model"]
F = TypeVar("F", bound=Callable[..., Any])
TOKEN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
CONTRACTS: dict[str, type["Contract"]] = {}  # "name/major" -> class, filled by declaring one


def token(text: str, what: str = "name") -> str:
    """`text` if it may stand in a subject (`[a-z0-9-]+`, at most 63 characters), else ValueError."""
    if not TOKEN.match(text):
        raise ValueError(f"{what} {text!r} must be 1 to 63 of a-z, 0-9 and '-', and start with a letter or digit")
    return text


class Method(msgspec.Struct, frozen=True):
    """One method of a contract, as derived from its signature."""

    contract: type["Contract"]
    name: str  # the token in subjects: `plan_round` is `plan-round`
    attribute: str  # the name in Python
    kind: Kind
    scope: Scope  # "model": also callable as model.<deployment>.<method>
    request: type[msgspec.Struct]
    reply: type[msgspec.Struct]
    doc: str

    def tail(self, caller: str, model: str = "") -> str:
        """The five tokens behind `svc`, `impl.<pool>` or `inst.<instance>` that name this call."""
        if model:
            return f"model.{model}.{self.name}.{caller}"
        return f"{self.contract.name}.v{self.contract.major}.{self.name}.{caller}"

    def subject(self, caller: str, model: str = "") -> str:
        """What a client publishes on: `svc.<contract>.v<major>.<method>.<caller>` or `model.<name>.<method>.<caller>`."""
        return self.tail(caller, model) if model else "svc." + self.tail(caller)


def _mark(kind: Kind, scope: Scope) -> Callable[[F], F]:
    def mark(function: F) -> F:
        function.__kernelm__ = (kind, scope)  # type: ignore[attr-defined]
        return function

    return mark


unary = _mark("unary", "svc")
streamed = _mark("streamed", "svc")
job = _mark("job", "svc")
model_unary = _mark("unary", "model")
model_streamed = _mark("streamed", "model")


class Contract:
    """Base of all contracts. Subclass with `name=` and `major=`; list the events that its plugins publish in `events`."""

    name: ClassVar[str]
    major: ClassVar[int]
    events: ClassVar[tuple[type[Event], ...]] = ()
    methods: ClassVar[dict[str, Method]]  # by subject token

    def __init_subclass__(cls, *, name: str = "", major: int = 0, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not name:  # an implementation, not a declaration
            return
        if name == "model" or major < 1:
            raise TypeError(f"contract {cls.__qualname__}: name must not be 'model' and major starts at 1")
        cls.name, cls.major = token(name, "contract name"), major
        if (key := cls.id()) in CONTRACTS:
            raise TypeError(f"contract {key} is declared twice: {CONTRACTS[key].__module__} and {cls.__module__}")
        cls.methods = {m.name: m for m in map(lambda a: _method(cls, a), list(vars(cls))) if m}
        CONTRACTS[key] = cls

    @classmethod
    def id(cls) -> str:
        """`name/major`, as manifests and messages write it."""
        return f"{cls.name}/{cls.major}"

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """JSON Schema 2020-12 of every request, reply and event, and which method takes what."""
        types: list[Any] = [t for m in cls.methods.values() for t in (m.request, m.reply)] + list(cls.events)
        schemas, components = msgspec.json.schema_components(types, ref_template="#/$defs/{name}")
        refs = iter(schemas)
        methods = {m.name: {"kind": m.kind, "scope": m.scope, "request": next(refs), "reply": next(refs)}
                   for m in cls.methods.values()}  # fmt: skip
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.id(), "methods": methods,
                "events": {e.TYPE: next(refs) for e in cls.events}, "$defs": components}  # fmt: skip

    @classmethod
    def schema_hash(cls) -> str:
        """First 16 hex digits of the SHA-256 of the schema without its descriptions: what the handshake compares."""
        canonical = msgspec.json.encode(_without_descriptions(cls.schema()), order="deterministic")
        return hashlib.sha256(canonical).hexdigest()[:16]


def _method(cls: type[Contract], attribute: str) -> Method | None:
    function = vars(cls)[attribute]
    if not hasattr(function, "__kernelm__"):
        return None
    kind, scope = function.__kernelm__
    hints = typing.get_type_hints(function)
    names = list(inspect.signature(function).parameters)
    request, reply = hints.get(names[1]) if len(names) > 1 else None, hints.get("return")
    if kind == "streamed":  # AsyncIterator[Frame]
        reply = (typing.get_args(reply) or (None,))[0]
    for what, kind_of in (("request", request), ("reply", reply)):
        if not (isinstance(kind_of, type) and issubclass(kind_of, msgspec.Struct)):
            raise TypeError(f"{cls.__qualname__}.{attribute}{inspect.signature(function)}: {what} must be a msgspec.Struct")
    assert request is not None
    assert reply is not None
    name = token(attribute.replace("_", "-"), "method")
    return Method(cls, name, attribute, kind, scope, request, reply, inspect.getdoc(function) or "")


def _without_descriptions(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_descriptions(v) for k, v in node.items() if k != "description" or isinstance(v, dict)}
    return [_without_descriptions(v) for v in node] if isinstance(node, list) else node


def method_of(declared: Any) -> Method:
    """The `Method` behind a contract's attribute, e.g. `method_of(Server.classify)`."""
    owner = next(c for c in CONTRACTS.values() if vars(c).get(declared.__name__) is declared)
    return owner.methods[declared.__name__.replace("_", "-")]


def find_contract(identifier: str) -> type[Contract]:
    """The contract called `name/major`; LookupError with the known ones otherwise."""
    try:
        return CONTRACTS[identifier]
    except KeyError:
        raise LookupError(f"contract {identifier!r} is not known; known are {', '.join(sorted(CONTRACTS))}") from None
