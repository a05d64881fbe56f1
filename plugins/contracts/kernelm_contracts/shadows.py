"""Shadow traffic: a deployment that answers copies of another one's calls, and what came of the copies."""

from typing import ClassVar

from msgspec import Struct

from kernelm_sdk.events import Event


class ShadowRequest(Struct, frozen=True):
    """Give the deployment `to` a copy of a share of the calls of `name` that come through gateways. Its answers are compared and
    thrown away: no caller waits for them or sees them."""

    name: str
    to: str = ""  # "" to end it, or to change the share alone
    percent: int = 0  # 1 to 100; 0 to end it
    why: str = ""


class Copies(Struct, frozen=True):
    """What came of copies of calls. Answers agree that have the same best labels, the same entities, the same text, or vectors
    whose cosine is at least 0.99."""

    same: int = 0
    different: int = 0
    failed: int = 0
    dropped: int = 0  # not made, since too many were under way or the shadow was just being started
    took_ms: float = 0.0  # of the shadow for those that it answered, together
    beside_ms: float = 0.0  # of the deployment for the same calls, together


class Shadow(Struct, frozen=True):
    """The record in KV `deployments` under `shadow.<name>`."""

    name: str
    to: str
    percent: int  # 0: it is over, and this is what came of it
    since: float = 0.0  # Unix seconds
    by: str = ""
    why: str = ""
    copies: Copies = Copies()


class Compared(Struct, frozen=True):
    """What came of copies since a gateway last told, of the shadow that began at `since`."""

    name: str
    to: str
    since: float
    copies: Copies


class ModelShadowed(Event, frozen=True):
    """Another deployment gets copies of a share of a model's calls from now on; with 0 percent none any more."""

    TYPE: ClassVar[str] = "model.shadowed"
    model: str
    to: str
    percent: int
    by: str
    why: str = ""
