"""Which instance of a deployment gets a call: the one with the least of this gateway's work, and for a prompt the one that has
read its beginning before.

The broker's queue group gives a call to a random instance. Where a route has one pool with several ready instances, the
gateway chooses better: by rendezvous hashing of the prompt's beginning with bounded loads, so that equal beginnings meet in one
instance's prefix cache and no instance gets more than FACTOR times the mean; without a prompt by least outstanding calls.
Where a route has weights, or nothing is known, "" leaves the choice to the broker. What is known comes from the kernel, is
dropped at each event of routes and instances, and is asked for anew in the background: no call waits for it.
Sources: Thaler, Ravishankar (1998), rendezvous hashing; Mirrokni, Thorup, Zadimoghaddam (2018), consistent hashing with bounded
loads; Mitzenmacher (2001) on least-loaded choice.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec

from kernelm_contracts.server import GenerateRequest
from kernelm_sdk.contract import Method
from kernelm_sdk.errors import Fault
from kernelm_sdk.events import Received
from kernelm_sdk.system import Empty, Kernel, SystemState

HEAD = 512  # characters of a prompt that decide where it goes
FACTOR = 1.25  # of the mean load, that an instance may have and still get a prompt by its beginning
FRESH_S = 10.0  # after which what is known is asked for anew, even without an event
# what an instance says, or nobody, when it is not the right one (any more), or has too much to do: the broker's choice is tried
ELSEWHERE = ("no_responders", "unknown_model", "stale_generation", "permission_denied", "busy")
RETRY_S = 1.0  # between two questions that fail
log = logging.getLogger("kernelm.gateway")


class Balancer:
    """Counts this gateway's calls under way, an instance each, and picks."""

    def __init__(self, bus: Any) -> None:
        self._bus = bus
        self._members: dict[str, tuple[str, ...]] = {}  # deployment -> ready instances, of those where there is a choice
        self._load: dict[str, int] = {}  # instance -> calls under way
        self._asked = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self._subscriptions: list[Any] = []
        self._random = random.Random()

    async def start(self) -> None:
        """Follow what changes."""
        self._subscriptions = [await self._bus.follow(self._changed, pattern) for pattern in ("evt.route.>", "evt.plugin.>")]

    async def stop(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        for subscription in self._subscriptions:
            await subscription.unsubscribe()

    async def _changed(self, _: Received) -> None:
        self._members.clear()  # the broker chooses until the kernel has answered
        self._asked = float("-inf")

    async def call(self, method: Method, request: msgspec.Struct, model: str, instance: str = "", **options: Any) -> Any:
        """As `bus.call`, on the instance that is best for it, unless one is named."""
        named = bool(instance)
        if model and (instance := instance or self._pick(model, request)):
            try:
                with self._under_way(instance):
                    return await self._bus.call(method, request, model=model, instance=instance, **options)
            except Fault as fault:
                if named or fault.code not in ELSEWHERE:
                    raise
                self._mistaken(model, fault)
        return await self._bus.call(method, request, model=model, **options)

    def stream(self, method: Method, request: msgspec.Struct, model: str, instance: str = "", **options: Any) -> AsyncIterator[Any]:
        """As `bus.stream`, on the instance that is best for it, unless one is named."""
        named = bool(instance)
        if model and (instance := instance or self._pick(model, request)):
            return self._picked(method, request, model, instance, named, options)
        frames: AsyncIterator[Any] = self._bus.stream(method, request, model=model, **options)  # itself: each hand costs each frame
        return frames

    async def _picked(self, method: Method, request: msgspec.Struct, model: str, instance: str, named: bool, options: dict[str, Any]
                      ) -> AsyncIterator[Any]:  # fmt: skip
        begun = False
        try:
            with self._under_way(instance):
                async with aclosing(self._bus.stream(method, request, model=model, instance=instance, **options)) as frames:
                    async for frame in frames:
                        begun = True
                        yield frame
            return
        except Fault as fault:
            if begun or named or fault.code not in ELSEWHERE:
                raise
            self._mistaken(model, fault)
        async with aclosing(self._bus.stream(method, request, model=model, **options)) as frames:
            async for frame in frames:
                yield frame

    def _pick(self, model: str, request: Any = None) -> str:
        """The instance that a call of `model` should go to; "" for whichever the broker takes."""
        if self._subscriptions and time.monotonic() - self._asked > FRESH_S and (self._asking is None or self._asking.done()):
            self._asked = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        members = self._members.get(model)
        if not members:
            return ""
        head = _head(request)
        if not head:
            least = min(self._load.get(name, 0) for name in members)
            return self._random.choice([name for name in members if self._load.get(name, 0) == least])
        most = math.ceil(FACTOR * (sum(self._load.get(name, 0) for name in members) + 1) / len(members))
        ranked = sorted(members, key=lambda name: hashlib.blake2b(head + name.encode(), digest_size=8).digest())
        return next((name for name in ranked if self._load.get(name, 0) < most), ranked[0])

    async def _ask(self) -> None:
        try:
            state: SystemState = await self._bus.call(Kernel.state, Empty(), timeout_s=5.0)
        except Fault as fault:
            log.info("calls are spread by the broker: %s", fault.message)
            self._asked = time.monotonic() - FRESH_S + RETRY_S
            return
        found = {}
        for route in state.routes:
            if route.kind == "model" and len(route.to) == 1:
                names = tuple(sorted(i.id for i in state.instances
                                     if i.pool == route.to[0].pool and i.state == "ready" and route.name in i.models))  # fmt: skip
                if len(names) > 1:
                    found[route.name] = names
        if self._asked > float("-inf"):  # nothing has changed meanwhile
            self._members = found

    def _mistaken(self, model: str, fault: Fault) -> None:
        """An instance that was picked did not answer for `model`."""
        if fault.code != "busy":  # others keep it so; what is known of it still holds
            self._members.pop(model, None)
            self._asked = float("-inf")

    @contextlib.contextmanager
    def _under_way(self, instance: str) -> Iterator[None]:
        """Counts a call of an instance that was picked."""
        self._load[instance] = self._load.get(instance, 0) + 1
        try:
            yield
        finally:
            if self._load[instance] == 1:
                del self._load[instance]
            else:
                self._load[instance] -= 1


def _head(request: Any) -> bytes:
    """The beginning of a prompt, as far as it decides; b"" for what has none."""
    if not isinstance(request, GenerateRequest):
        return b""
    if request.prompt:
        return request.prompt[:HEAD].encode()
    text, size = [], 0
    for message in request.messages:
        text.append(f"{message.role}\0{message.content[:HEAD]}\0")
        size += len(text[-1])
        if size >= HEAD:
            break
    return "".join(text)[:HEAD].encode()
