"""How many replicas a served model needs: from its arrivals and its queue, so that calls meet their objective.

The broker hands each call to any replica at random, where it waits in a queue of its own. So a stream of `a` calls per second over
k replicas is k streams of a/k (a Poisson stream that is split at random stays one), each into a queue with c slots that answer `r`
calls per second each: the share C(c, a/kr) * exp(-(c*r - a/k) * t / v) waits longer than t. C is Erlang's, v = (1 + variation) / 2
tells how even the calls are (Allen and Cunneen's factor; 1 for exponential times: M/M/c). One queue for all replicas would need
fewer of them, but nobody here could hold it. What the formula does not know (bursts, a neighbour that takes cores) shows in the
measured latency, which adds one replica at a time.

Up at once, down late and with calls to spare: at a constant load the number never goes down and up again.
"""

from math import ceil, exp

from kernelm_contracts.scheduler import ModelState
from kernelm_scheduler.settings import Serving

MOST_SLOTS = 100_000  # beyond, by the load alone


def erlang_c(slots: int, load: float) -> float:
    """The share of calls that wait at all, for `load` busy slots on average; 1 where they can't keep up."""
    if load >= slots:
        return 1.0
    blocked = 1.0
    for n in range(1, slots + 1):
        blocked = load * blocked / (n + load * blocked)
    return slots * blocked / (slots - load * (1.0 - blocked))


def needed(model: ModelState, arrivals_per_s: float, rules: Serving) -> int:
    """Replicas for so many calls per second, before the bounds of the model. Without a measured rate, by the latency alone."""
    if model.rate_per_s <= 0:
        late = model.objective_ms > 0 and model.latency_ms > model.objective_ms
        busy = arrivals_per_s > 0 or model.queue > 0
        grown = min(ceil(model.replicas * model.latency_ms / model.objective_ms), model.replicas * 2) if late else model.replicas
        return max(grown, 1 if busy else 0)
    arrivals = arrivals_per_s + model.queue / rules.drain_s
    if arrivals <= 0:
        return 0
    slots = max(model.slots, 1)
    each = model.rate_per_s / slots  # calls per second of one slot
    load = arrivals / each
    replicas = int(load // slots) + 1
    if model.objective_ms <= 0:
        return replicas
    patience = max(model.objective_ms / 1000.0 - 1.0 / each, 0.0)  # in the queue
    if patience == 0.0:  # no number keeps an objective below the time of one call: none is wasted on it
        return max(ceil(2 * load / slots), replicas)
    while late_share(slots, load / replicas, each, patience, rules.variation) > rules.late and replicas * slots < MOST_SLOTS:
        replicas += 1
    return replicas


def late_share(slots: int, load: float, each: float, patience_s: float, variation: float) -> float:
    """The share of calls that wait longer than `patience_s` at one replica with so many slots, of which `load` are busy on average
    and `each` answers so many calls per second."""
    if load >= slots:
        return 1.0
    return erlang_c(slots, load) * exp(-min((slots - load) * each * patience_s * 2.0 / (1.0 + variation), 700.0))


def is_late(model: ModelState, now: float, rules: Serving) -> bool:
    """Whether calls surely miss the objective, though one by itself would not, and the last change has had time to help.
    `latency_ms` is the upper end of a histogram's step of two: only beyond the next step it is surely more."""
    if model.objective_ms <= 0 or not model.replicas or now - model.scaled < model.start_s + rules.settle_s:
        return False
    alone_ms = 1000.0 * max(model.slots, 1) / model.rate_per_s if model.rate_per_s > 0 else 0.0
    return model.latency_ms / 2 > model.objective_ms > alone_ms


def wanted(model: ModelState, now: float, rules: Serving) -> tuple[int, str]:
    """How many replicas the model is to have, and why; those that it has, "" for no change."""
    low, high = max(model.minimum, 0), max(model.maximum, model.minimum, 0)
    load = f"{model.arrivals_per_s:.3g} calls/s, {model.queue} in the queue"
    up, late = needed(model, model.arrivals_per_s, rules), is_late(model, now, rules)
    if late and up <= model.replicas < high:
        return model.replicas + 1, f"{load}: p99 is over {model.latency_ms / 2:g} ms, not within {model.objective_ms:g} ms"
    if model.replicas < low and up <= low:
        return low, f"at least {low} replica{'s' * (low > 1)}"
    if model.replicas < max(low, min(up, high)):
        objective = f" within {model.objective_ms:g} ms" if model.objective_ms else ""
        return max(low, min(up, high)), f"{load}: {up} replicas answer them{objective}"
    if model.replicas > high:
        return high, f"at most {high} replicas"
    settled_s, zero_after_s = now - model.scaled, model.zero_after_s or rules.idle_s
    if low == 0 and model.replicas and min(model.idle_s, settled_s) >= zero_after_s and not model.queue:
        return 0, f"no call for {model.idle_s:.0f} s"
    if late or settled_s < rules.down_after_s:
        return model.replicas, ""
    down = max(needed(model, model.arrivals_per_s * rules.spare, rules), low, 1)
    if down < model.replicas:
        return down, f"{load}: {down} replicas are enough, with {rules.spare:g} times the calls"
    return model.replicas, ""
