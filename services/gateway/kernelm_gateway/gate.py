"""The one door behind both protocols: who asks, may they, where does it go, what does it cost.

What an API key may call is decided here and nowhere else: the methods of models, reading the jobs and runs of its own
tenant, and, for a key that was created with `--admin`, managing plugins, pools and routes. Everything else on the bus
belongs to programs with a NATS identity of their own: joining the system above all, and making and revoking keys, so that
who has stolen an administrator's key can't outlive its revocation.

The kernel sees the gateway as the caller, and learns for whom it calls from the header `Kernelm-On-Behalf`, which it
believes of services only.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from kernelm_contracts.jobs import JobList, JobRecord, Jobs, RunView
from kernelm_gateway.keys import KeyRing, grant, sees
from kernelm_gateway.settings import GatewaySettings
from kernelm_gateway.usage import Meter
from kernelm_sdk.contract import TOKEN, Method, method_of
from kernelm_sdk.errors import ClientFault, Fault, KernelFault
from kernelm_sdk.system import Empty, Kernel, Key, KeyList, Route, SystemState

READABLE = tuple(map(method_of, (Jobs.get, Jobs.find, Jobs.get_run, Jobs.follow_run)))
MANAGEABLE = tuple(map(method_of, (Kernel.state, Kernel.load, Kernel.swap, Kernel.rollback, Kernel.unload, Kernel.scale,
                                   Kernel.set_route, Kernel.start_pool, Kernel.stop_pool, Kernel.list_keys)))  # fmt: skip
ON_BEHALF = "Kernelm-On-Behalf"
START_S = 0.2  # between two tries of a stream from a model that is being started


class Gate:
    """Admits, calls, counts. `bus` is a `kernelm_sdk.bus.Bus`, or what has its `call`, `stream`, `bucket` and `connected`."""

    def __init__(self, bus: Any, settings: GatewaySettings) -> None:
        self.bus, self.settings = bus, settings
        self.keys = KeyRing(bus.bucket("keys", Key), settings.key_cache_s)
        self.meter = Meter()

    def raise_if_disconnected(self) -> None:
        """At once, in place of a time-out: the client's library tries again, on another gateway if there is one."""
        if not self.bus.connected:
            what = "the gateway has no connection to the broker"
            raise KernelFault("disconnected", what, "try again in a moment", retriable=True)

    async def identify(self, authorization: str) -> Key:
        """The key of a request; ClientFault "unauthorized", KernelFault "disconnected"."""
        self.raise_if_disconnected()
        return await self.keys.check(authorization)

    async def call(self, key: Key, method: Method, request: msgspec.Struct, model: str = "", timeout_s: float = 0.0) -> Any:
        """The reply of a unary method; the fault of whoever failed. `timeout_s` 0: as in the settings."""
        self.admit(key, method, model)
        tokens, failed = 0, True
        try:
            reply = await self._patiently(method, request, model, timeout_s or self.settings.call_timeout_s,
                                          {ON_BEHALF: f"key-{key.id}"} if method.contract is Kernel else None)  # fmt: skip
            tokens, failed = getattr(reply, "tokens", 0), False
        except Fault as fault:
            raise (await self._explain(key, model, fault) if model else fault) from None
        finally:
            self.meter.count(key.tenant, model, tokens, failed)
        return own(key, reply)

    async def _patiently(self, method: Method, request: msgspec.Struct, model: str, timeout_s: float,
                         headers: dict[str, str] | None) -> Any:  # fmt: skip
        """As `bus.call`; a model that had no instance, and is being started for this call, is waited for."""
        try:
            return await self.bus.call(method, request, model=model, timeout_s=timeout_s, headers=headers)
        except KernelFault as fault:
            if fault.code != "starting":
                raise
        patience_s = min(self.settings.start_wait_s, timeout_s)
        return await self.bus.call(method, request, model=model, timeout_s=timeout_s, patience_s=patience_s)

    async def stream(self, key: Key, method: Method, request: msgspec.Struct, model: str = "") -> AsyncIterator[Any]:
        """The frames of a streamed method."""
        self.admit(key, method, model)
        failed, until = True, time.monotonic() + self.settings.start_wait_s
        try:
            while failed:
                try:
                    async for frame in self.bus.stream(method, request, model=model, idle_s=self.settings.call_timeout_s):
                        yield own(key, frame)
                    failed = False
                except KernelFault as fault:  # "starting", before any frame: it had no instance, and gets one for this call
                    if fault.code != "starting" or time.monotonic() > until:
                        raise
                    await asyncio.sleep(START_S)
        finally:
            self.meter.count(key.tenant, model, failed=failed)

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
        """Nobody answers for `model`: is there no such deployment, or is it not up? The broker can't tell; the kernel can."""
        if fault.code not in ("no_responders", "permission_denied"):
            return fault
        try:
            names = [route.name for route in await self.deployments(key)]
        except Fault:  # nor does the kernel answer: then the first fault says what matters
            return fault
        if model not in names:
            return unknown_model(model, names)
        return KernelFault("not_ready", f"model {model!r} has no instance that answers", "try again in a moment", retriable=True)


def unknown_model(model: str, names: list[str] | None = None) -> ClientFault:
    """The fault for a name that is no deployment; `names` are those that are."""
    remedy = f"deployments are: {', '.join(names)}" if names else "GET /v1/models lists the deployments"
    return ClientFault("unknown_model", f"there is no model {model[:64]!r}", remedy, param="model")


def own(key: Key, reply: Any) -> Any:
    """The reply as far as it is the tenant's: jobs and runs of other tenants are as if they were not there. Keys without hashes."""
    if isinstance(reply, JobList):
        return JobList(tuple(job for job in reply.jobs if job.spec.tenant == key.tenant))
    if isinstance(reply, JobRecord) and reply.spec.tenant != key.tenant:
        raise ClientFault("not_found", f"there is no job {reply.id!r}", "GET /v1/jobs lists your tenant's jobs")
    if isinstance(reply, RunView) and reply.run.spec.tenant != key.tenant:
        raise ClientFault("not_found", f"there is no run {reply.run.id!r}", "`kernelm jobs` lists runs")
    if isinstance(reply, KeyList):  # hashes are for whoever checks keys
        return KeyList(tuple(msgspec.structs.replace(k, hash="", previous_hash="") for k in reply.keys))
    return reply
