"""Settings of the scheduler plugin."""

from msgspec import Struct


class Weights(Struct, frozen=True, forbid_unknown_fields=True):
    """How much each term counts in the score of a node; each term lies between 0 and 1."""

    packing: float = 1.0  # least waste: the less is left on the node afterwards, the better
    locality: float = 0.5  # share of the job's artifacts that the node has in its cache
    spread: float = 0.25  # share of the tenant's jobs that are elsewhere, so that one dying node takes fewer of them


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Units: `_s` in seconds."""

    weights: Weights = Weights()
    aging_s: float = 300.0  # so long a wait counts as much as one step of priority; above 0
    reserve_after_s: float = 120.0  # after so long a wait, later jobs may not take what the job is waiting for

    def __post_init__(self) -> None:
        if self.aging_s <= 0:
            raise ValueError("aging_s must be above 0")
        if min(self.weights.packing, self.weights.locality, self.weights.spread) < 0:
            raise ValueError("weights must not be negative")
