"""How many replicas a served model needs: from its arrivals and its queue, so that calls meet their objective.

M/M/c (Erlang C): with c slots that answer `r` calls per second each, of calls that come at `a` per second the share
C(c, a/r) * exp(-(c*r - a) * t) waits longer than t.
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
    while replicas * slots < MOST_SLOTS:
        count = replicas * slots
        if erlang_c(count, load) * exp(-min((count - load) * each * patience, 700.0)) <= rules.late:
            break
        if patience == 0.0 and count >= 2 * load + slots:  # no number keeps an objective below the time of one call
            break
        replicas += 1
    return replicas


def wanted(model: ModelState, now: float, rules: Serving) -> tuple[int, str]:
    """How many replicas the model is to have, and why; those that it has, "" for no change."""
    low, high = max(model.minimum, 0), max(model.maximum, model.minimum, 0)
    load = f"{model.arrivals_per_s:.3g} calls/s, {model.queue} in the queue"
    up = needed(model, model.arrivals_per_s, rules)
    if model.replicas < max(low, min(up, high)):
        objective = f" within {model.objective_ms:g} ms" if model.objective_ms else ""
        return max(low, min(up, high)), f"{load}: {up} replicas answer them{objective}"
    if model.replicas > high:
        return high, f"at most {high} replicas"
    if now - model.scaled < rules.down_after_s:
        return model.replicas, ""
    if low == 0 and model.replicas and model.idle_s >= rules.idle_s and not model.queue:
        return 0, f"no call for {model.idle_s:.0f} s"
    down = max(needed(model, model.arrivals_per_s * rules.spare, rules), low, 1)
    if down < model.replicas:
        return down, f"{load}: {down} replicas are enough, with {rules.spare:g} times the calls"
    return model.replicas, ""
