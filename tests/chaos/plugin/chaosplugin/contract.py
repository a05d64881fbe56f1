"""`chaos/1`: calls whose effects can be counted, and the event that the load publishes."""

from typing import Any, ClassVar

from msgspec import Struct

from kernelm_sdk.contract import Contract, unary
from kernelm_sdk.events import Event


class Effect(Struct, frozen=True):
    """One effect to be had once. A caller that got no answer asks again under the same id, as another try."""

    id: str
    attempt: int = 1
    hold_s: float = 0.0  # so long the handler works before the effect: a kill finds it in the middle
    crash: bool = False  # poison: the handler ends its process
    padding: str = ""

class Applied(Struct, frozen=True):
    id: str
    instance: str
    repeated: bool  # the effect was there already

class Tick(Event, frozen=True):
    """A durable event of the load; `run` and `n` name it."""

    TYPE: ClassVar[str] = "chaos.tick"
    run: str
    n: int
    padding: str = ""

class Chaos(Contract, name="chaos", major=1):
    """Calls with an effect each."""

    events = (Tick,)

    @unary
    async def apply(self, request: Effect, call: Any) -> Applied: ...
