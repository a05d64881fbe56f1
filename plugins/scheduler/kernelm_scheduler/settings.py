"""Settings of the scheduler plugin."""

from msgspec import Struct


class Weights(Struct, frozen=True, forbid_unknown_fields=True):
    """How much each term counts in the score of a node; each term lies between 0 and 1."""

    packing: float = 1.0  # least waste: the less is left on the node afterwards, the better
    locality: float = 0.5  # share of the job's artifacts that the node has in its cache, or has loaded
    spread: float = 0.25  # fewer jobs of the tenant there, so that one dying node takes fewer of them
    hooks: float = 0.5  # each function of a third party that is installed (hooks.py)


class Preemption(Struct, frozen=True, forbid_unknown_fields=True):
    """When a job is stopped, at a checkpoint, for another. Units: `_s` in seconds."""

    heads: int = 2  # so many of the first waiting jobs are helped in one round; 0: nobody is ever stopped
    victims: int = 64  # so many placed jobs are looked at for each
    most: int = 3  # a job that was stopped so often is not stopped again
    rest_s: float = 60.0  # nor one that has run for less
    shorter: float = 0.0  # a job whose remaining time is so small a part of another's may stop it; 0 for never


class Elastic(Struct, frozen=True, forbid_unknown_fields=True):
    """When a running job changes its size. Units: `_s` in seconds."""

    gain: float = 2.0  # the time that is saved must be so many times what the restart costs
    rest_s: float = 60.0  # no change of an allocation that is younger
    efficiency: float = 0.3  # a further member must add so much of what the first ones add each
    planned: int = 256  # up to so many elastic jobs are sized together (goodput.py); 0 for none
    small_first: float = 0.7  # there, how much more small jobs count: the power of its devices that speed grows with; 0: not at all
    keep: float = 0.2  # there, what a job has is worth so much more than a change; less if it has had it for longer than lasts_s
    lasts_s: float = 600.0  # there, so long a configuration is reckoned to last; one that has lasted longer, as long again
    patience_s: float = 600.0  # there, after so long a wait the first of the queue are not passed over for goodput


class Serving(Struct, frozen=True, forbid_unknown_fields=True):
    """How many replicas a served model gets. Units: `_s` in seconds."""

    late: float = 0.01  # share of calls that may be later than the objective
    variation: float = 0.25  # of the time of a call: variance over the square of the mean; 1 for exponential times
    spare: float = 1.2  # on the way down, calls that are reckoned with over those that come
    down_after_s: float = 120.0  # since the last change of the number
    idle_s: float = 600.0  # without a call, a model that may go to zero goes
    drain_s: float = 10.0  # a queue is to be worked off in so long
    settle_s: float = 10.0  # so long after a new replica answers, what waited for it has gone, and latency is worth a look


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Units: `_s` in seconds."""

    weights: Weights = Weights()
    aging_s: float = 300.0  # so long a wait counts as much as one step of priority; above 0
    stretch: float = 0.0  # a job's known run time counts as so many times as late a submission: short jobs first
    stretch_s: float = 86400.0  # no run time counts for more
    urgency_s: float = 3600.0  # so much earlier counts a job that would miss a deadline that it still can meet
    reserve_after_s: float = 120.0  # after so long a wait, later jobs may not take what the job is waiting for
    reservations: int = 8  # so many at a time; the first waiting job has one at once; 0 for none
    preemption: Preemption = Preemption()
    elastic: Elastic = Elastic()
    serving: Serving = Serving()

    def __post_init__(self) -> None:
        if self.aging_s <= 0:
            raise ValueError("aging_s must be above 0")
        if min(self.weights.packing, self.weights.locality, self.weights.spread) < 0:
            raise ValueError("weights must not be negative")
        if min(self.stretch, self.stretch_s, self.urgency_s, self.preemption.rest_s, self.elastic.rest_s) < 0:
            raise ValueError("stretch, stretch_s, urgency_s and rest_s must not be negative")
        if min(self.elastic.planned, self.elastic.small_first, self.elastic.keep, self.elastic.patience_s) < 0:
            raise ValueError("elastic: planned, small_first, keep and patience_s must not be negative")
        if self.elastic.lasts_s <= 0 or self.elastic.small_first >= 1:
            raise ValueError("elastic: lasts_s must be above 0, small_first below 1")
        if not 0 < self.serving.late < 1 or self.serving.spare < 1 or self.serving.drain_s <= 0 or self.serving.variation < 0:
            raise ValueError("serving: late lies between 0 and 1, spare is at least 1, drain_s above 0, variation not below")
