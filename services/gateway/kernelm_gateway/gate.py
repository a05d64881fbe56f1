"""The one door behind both protocols: who asks, may they, where does it go, what does it cost.

What an API key may call is decided here and nowhere else: the methods of models, reading the jobs and runs of its own
tenant, submitting and cancelling them where its methods say so by name, and, for a key that was created with `--admin`,
managing plugins, pools and routes. Everything else on the bus belongs to programs with a NATS identity of their own:
joining the system above all, and making and revoking keys, so that who has stolen an administrator's key can't outlive its
revocation.

The kernel sees the gateway as the caller, and learns for whom it calls from the header `Kernelm-On-Behalf`, which it
believes of services only.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from kernelm_contracts.admission import TENANT
from kernelm_contracts.jobs import JobList, JobName, JobRecord, Jobs, RunName, RunRecord, RunView
from kernelm_gateway import redaction
from kernelm_gateway.accounting import Ledger
from kernelm_gateway.balance import ELSEWHERE, Balancer
from kernelm_gateway.generations import of_generation
from kernelm_gateway.keys import KeyRing, grant, sees
from kernelm_gateway.loading import Loading
from kernelm_gateway.oidc import Issuer
from kernelm_gateway.policy import Policy
from kernelm_gateway.settings import GatewaySettings
from kernelm_gateway.shadows import Shadows
from kernelm_sdk import tracing
from kernelm_sdk.contract import TOKEN, Method, method_of
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Empty, Kernel, Key, KeyList, Route, SystemState

USAGE = method_of(Jobs.usage)
ASKED_OF_TENANT = (USAGE, method_of(Jobs.find))  # their queries have the field `tenant`
READABLE = tuple(map(method_of, (Jobs.get, Jobs.find, Jobs.get_run, Jobs.follow_run)))
SUBMITTABLE = tuple(map(method_of, (Jobs.submit, Jobs.submit_run, Jobs.cancel, Jobs.cancel_run)))
MANAGEABLE = tuple(map(method_of, (Kernel.state, Kernel.load, Kernel.swap, Kernel.rollback, Kernel.unload, Kernel.scale,
                                   Kernel.set_route, Kernel.start_pool, Kernel.stop_pool, Kernel.list_keys)))  # fmt: skip
ON_BEHALF = "Kernelm-On-Behalf"
CARRIED = "1 MB"  # `max_payload` of kernelm_authority.broker
START_S = 0.2  # between two tries of a call for a model that is being started


class Gate:
    """Admits, calls, counts. `bus` is a `kernelm_sdk.bus.Bus`, or what has its `call`, `stream`, `follow`, `bucket` and
    `connected`."""

    def __init__(self, bus: Any, settings: GatewaySettings, policy: Policy | None = None, home: Path | None = None) -> None:
        policy = policy or Policy()
        self.bus, self.settings = bus, settings
        self.ledger = Ledger(bus, policy, home)
        self.shadows = Shadows(bus, self.ledger.metrics, settings.call_timeout_s)
        self._issuer = Issuer(policy.oidc) if policy.oidc else None
        self.keys = KeyRing(bus.bucket("keys", Key), settings.key_cache_s)
        self.balancer, self.loading = Balancer(bus), Loading(bus)
        self._redaction = redaction.Redaction(bus, dict(policy.private))

    def raise_if_disconnected(self) -> None:
        """At once, in place of a time-out: the client's library tries again, on another gateway if there is one."""
        if not self.bus.connected:
            what = "the gateway has no connection to the broker"
            raise KernelFault("disconnected", what, "try again in a moment", retriable=True)

    async def arrive(self, header: Callable[[str], str]) -> Key:
        """The key of a request, by whichever door it comes. `header` gives a header (HTTP) or metadata (gRPC) by its name in lower
        case, "" for none; what it says of traces and private data holds for what this task does from now on."""
        tracing.arrived(header(tracing.TRACEPARENT))
        redaction.arrived(header(redaction.HEADER))
        return await self.identify(header("authorization"))

    async def identify(self, authorization: str) -> Key:
        """The key of a request; ClientFault "unauthorized", KernelFault "disconnected"."""
        self.raise_if_disconnected()
        token = authorization.strip().rpartition(" ")[2]
        if self._issuer is not None and self._issuer.looks_like_one(token):
            return await self._issuer.check(token)
        return await self.keys.check(authorization)

    async def call(self, key: Key, method: Method, request: msgspec.Struct, model: str = "", timeout_s: float = 0.0) -> Any:
        """The reply of a unary method; the fault of whoever failed. `timeout_s` 0: as in the settings."""
        self.admit(key, method, model)
        if method in SUBMITTABLE or method in ASKED_OF_TENANT:
            request = await self._as_own(key, request)
        private = self._redaction.wanted(key.tenant) if model else frozenset()
        if "prompt" in private:
            request = await self._redaction.request(request)
        with self.ledger.entry(key, method, model, request) as entry:
            timeout_s, headers, instance = timeout_s or self.settings.call_timeout_s, _for(key, method), ""
            until = time.monotonic() + min(self.settings.start_wait_s, timeout_s)
            copy = self.shadows.copy_of(method, request, model, headers)
            while True:
                options: Any = {"timeout_s": timeout_s, "headers": headers, "instance": instance}
                try:
                    entry.last = await self.balancer.call(method, request, model, **options)
                    if copy is not None:
                        self.shadows.make(copy, [entry.last])
                    return own(key, await self._redaction.reply(entry.last) if "answer" in private else entry.last)
                except Fault as fault:
                    instance = await self._again(key, model, request, fault, instance, until)

    async def _as_own(self, key: Key, request: Any) -> Any:
        """What is submitted, asked for or accounted for is the key's tenant's, and what is cancelled has to be."""
        if isinstance(request, RunName):
            own(key, await self.bus.call(Jobs.get_run, request, timeout_s=self.settings.call_timeout_s))
        elif isinstance(request, JobName):
            own(key, await self.bus.call(Jobs.get, request, timeout_s=self.settings.call_timeout_s))
        elif getattr(request, "parent", ""):
            raise ClientFault("invalid", "parent: only a job has children", "leave it out", param="parent")
        else:
            return msgspec.structs.replace(request, tenant=key.tenant)
        return request

    async def _again(self, key: Key, model: str, request: Any, fault: Fault, tried: str, until: float) -> str:
        """Where a call is to be tried again after `fault`, and a moment: an instance, or "" for whoever is best. It is of use for a
        model that is being started for this call, and for a generation that is on its way, or has a share of the calls only; else
        the fault is raised. `tried`: the instance whose fault it is, if it was named; `until` is monotonic."""
        if fault.code == "too_large" and fault.details.get("limit") == "broker":  # its words are for who speaks NATS
            what = f"the request is larger than the broker carries ({CARRIED})"
            raise ClientFault("too_large", what, "send it in several requests") from None
        if model and time.monotonic() < until:
            if fault.code == "starting" or (tried and fault.code in ELSEWHERE):
                await asyncio.sleep(START_S)
                return ""
            if fault.code == "stale_generation" and fault.retriable:
                try:
                    found = of_generation(await self.state(), model, request.at_least)
                except Fault:  # the kernel does not answer: then the first fault says what matters
                    raise fault from None
                if found:
                    return random.choice(found)
                if found is not None:
                    await asyncio.sleep(START_S)
                    return ""
        raise (await self._explain(key, model, fault) if model else fault) from None

    async def stream(self, key: Key, method: Method, request: msgspec.Struct, model: str = "") -> AsyncIterator[Any]:
        """The frames of a streamed method. Close it (`aclosing`) to end the work behind it."""
        self.admit(key, method, model)
        until = time.monotonic() + self.settings.start_wait_s
        private = self._redaction.wanted(key.tenant) if model else frozenset()
        if "prompt" in private:
            request = await self._redaction.request(request)
        with self.ledger.entry(key, method, model, request) as entry:
            instance, headers = "", _for(key, method)
            copy = self.shadows.copy_of(method, request, model, headers)
            while True:
                options: Any = {"idle_s": self.settings.call_timeout_s, "headers": headers, "instance": instance}
                try:
                    said = self.balancer.stream(method, request, model, **options)
                    if copy is not None:
                        said = copy.heard(said)
                    async with aclosing(self._redaction.frames(said) if "answer" in private else said) as frames:
                        async for frame in frames:
                            entry.came(frame)
                            yield frame if model else own(key, frame)
                    if copy is not None:
                        self.shadows.make(copy, copy.frames)
                    return
                except Fault as fault:
                    instance = await self._again(key, model, request, fault, instance, until if entry.last is None else 0.0)

    def admit(self, key: Key, method: Method, model: str = "") -> None:
        """ClientFault if the key may not: "permission_denied", "invalid" without a model, "unknown_model"."""
        if method.scope == "model":
            if not model:
                raise ClientFault("invalid", "model: is missing", "name a deployment; GET /v1/models lists them", param="model")
            if not TOKEN.match(model):
                raise unknown_model(model)
        elif method in MANAGEABLE:
            if not key.admin:
                raise ClientFault("permission_denied", f"API key {key.id} ({key.name}) may not manage the system: "
                                  f"{method.contract.id()}.{method.name} is for administrators",
                                  "use a key that was made by `kernelm key create NAME --admin`")  # fmt: skip
        elif method in SUBMITTABLE:
            if not key.admin and method.name not in key.methods:  # "*" was said before there was such a thing
                raise ClientFault("permission_denied", f"API key {key.id} ({key.name}) may not call {method.name!r}",
                                  f"ask for a key whose methods name {method.name!r}: a job may read and change much")  # fmt: skip
            if key.admin:
                return
        elif method is USAGE:  # its own tenant's: nothing to be granted
            return
        elif method not in READABLE:
            raise ClientFault("permission_denied", f"{method.contract.id()}.{method.name} is not open to API keys",
                              "use a NATS identity with that permission, or the `kernelm` command")  # fmt: skip
        grant(key, method, model)

    async def state(self) -> SystemState:
        """Instances, pools and routes, as the kernel has them."""
        state: SystemState = await self.bus.call(Kernel.state, Empty(), timeout_s=self.settings.call_timeout_s)
        return state

    async def deployments(self, key: Key) -> list[Route]:
        """The routes of the models that the key was granted, by name."""
        return self.visible(key, await self.state())

    @staticmethod
    def visible(key: Key, state: SystemState) -> list[Route]:
        """Of `state`, the routes of the models that the key was granted, by name."""
        return sorted((r for r in state.routes if r.kind == "model" and sees(key, r.name)), key=lambda r: r.name)

    async def _explain(self, key: Key, model: str, fault: Fault) -> Fault:
        """Nobody answers for `model`: is there no such deployment, or is it not up yet? The broker can't tell; the kernel can."""
        if fault.code == "starting":
            return self.loading.explained(model, fault)
        if fault.code == "unsupported_method" and not fault.remedy:  # of a bus that knows subjects alone
            return ClientFault("unsupported_method", f"model {model!r} does not answer calls of this kind",
                               "name a deployment that does: its ModelMetadata say what it answers", param="model")  # fmt: skip
        if fault.code not in ("no_responders", "permission_denied"):
            return fault
        try:
            state = await self.state()
        except Fault:  # nor does the kernel answer: then the first fault says what matters
            return fault
        names = [route.name for route in self.visible(key, state)]
        if model not in names and not any(model in swap.routes and not swap.over for swap in state.swaps):
            return unknown_model(model, names)
        what = f"model {model!r} has no instance that answers"
        return self.loading.explained(model, KernelFault("not_ready", what, "try again in a moment", retriable=True))


def _for(key: Key, method: Method) -> dict[str, str]:
    """For whom it is: to the kernel the key, which it believes, to others the tenant, by which servers tell our callers apart."""
    return {ON_BEHALF: f"key-{key.id}"} if method.contract is Kernel else {TENANT: key.tenant}


def unknown_model(model: str, names: list[str] | None = None) -> ClientFault:
    """The fault for a name that is no deployment; `names` are those that are."""
    remedy = f"deployments are: {', '.join(names)}" if names else "GET /v1/models lists the deployments"
    return ClientFault("unknown_model", f"there is no model {model[:64]!r}", remedy, param="model")


def own(key: Key, reply: Any) -> Any:
    """The reply as far as it is the tenant's: jobs and runs of other tenants are as if they were not there. Keys without hashes."""
    if isinstance(reply, JobList):  # the tenant's was asked for: an older job table does not know of that
        return msgspec.structs.replace(reply, jobs=tuple(job for job in reply.jobs if job.spec.tenant == key.tenant))
    if isinstance(reply, JobRecord) and reply.spec.tenant != key.tenant:
        raise ClientFault("not_found", f"there is no job {reply.id!r}", "GET /v1/jobs lists your tenant's jobs")
    if isinstance(reply, RunRecord) and reply.spec.tenant != key.tenant:
        raise ClientFault("not_found", f"there is no run {reply.id!r}", "`kernelm jobs` lists runs")
    if isinstance(reply, RunView) and reply.run.spec.tenant != key.tenant:
        raise ClientFault("not_found", f"there is no run {reply.run.id!r}", "`kernelm jobs` lists runs")
    if isinstance(reply, KeyList):  # hashes are for whoever checks keys
        return KeyList(tuple(msgspec.structs.replace(k, hash="", previous_hash="") for k in reply.keys))
    return reply
