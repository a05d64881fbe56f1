"""How far models are on their way to answer, for who is told to come back later: servers publish it (`model.loading`)."""

import math
import time
from typing import Any

import msgspec

from kernelm_contracts.server import ModelLoading
from kernelm_sdk.errors import Fault, from_body
from kernelm_sdk.events import Received

QUIET_S = 600.0  # who has said nothing for so long is not loading any more
LONGEST_S = 60.0  # that a client is told to wait


class LoadingProgress(msgspec.Struct, frozen=True):
    """Of the model that a call was for."""

    fraction: float  # 0 to 1
    phase: str  # what its server does now, for people
    generation: int


class Loading:
    """What was heard last of each model. `bus`: what has `follow`."""

    def __init__(self, bus: Any) -> None:
        self._bus = bus
        self._heard: dict[str, tuple[float, float, ModelLoading]] = {}  # model -> first and last heard (monotonic), last told
        self._subscription: Any = None

    async def start(self) -> None:
        self._subscription = await self._bus.follow(self._told, "evt.model.loading.*")

    async def stop(self) -> None:
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    async def _told(self, received: Received) -> None:
        if not isinstance(told := received.event, ModelLoading):
            return
        now = time.monotonic()
        self._heard = {name: heard for name, heard in self._heard.items() if now - heard[1] < QUIET_S}
        first, _, before = self._heard.get(told.model, (now, now, told))
        if told.fraction >= 1.0:
            self._heard.pop(told.model, None)
        else:
            self._heard[told.model] = (first if before.pool == told.pool else now), now, told

    def of(self, model: str) -> LoadingProgress | None:
        """How far `model` is; None if nothing is known of it."""
        if model not in self._heard or time.monotonic() - self._heard[model][1] > QUIET_S:
            return None
        told = self._heard[model][2]
        return LoadingProgress(told.fraction, told.phase, told.generation)

    def explained(self, model: str, fault: Fault) -> Fault:
        """The fault with how far the model is, and with the seconds that the rest will take if it goes on as so far."""
        if (progress := self.of(model)) is None:
            return fault
        body, more = fault.body(), {"progress": msgspec.to_builtins(progress)}
        if progress.fraction > 0:
            so_far = time.monotonic() - self._heard[model][0]
            left_s = math.ceil(so_far * (1 - progress.fraction) / progress.fraction)
            more["retry_after_s"] = min(max(left_s, 1), LONGEST_S)
        what = f"{fault.message}; it is loading: {progress.fraction:.0%}, {progress.phase}"
        return from_body(msgspec.structs.replace(body, message=what, details={**body.details, **more}))
