"""The load of the deployments, as their instances count it: arrivals, queue, service rate, latency. Pure; `scaling.py` asks.

Nothing stands in the path of a call, so the instances themselves are asked (`plugin/1.probe`): calls answered, calls in flight,
the time in which at least one was being answered, a histogram of latencies. Over a window, calls that came are those that were
answered and those that wait now and did not before. The rate of an instance is its calls over its busy time: the service law of
operational analysis (Denning and Buzen 1978, section 3), which needs no assumption on distributions, sees what a noisy neighbour
costs, and for a server that batches is a lower bound that rises with the load.
"""

from collections import deque
from collections.abc import Mapping
from math import exp

from msgspec import Struct

from kernelm_sdk.counters import Counters
from kernelm_sdk.system import Probe

MEMORY = 6.0  # windows after which what was seen of the service rate counts for a third


class Load(Struct, frozen=True):
    """Of one deployment, over the last window. Units as in `ModelState`."""

    arrivals_per_s: float = 0.0
    queue: int = 0
    rate_per_s: float = 0.0
    latency_ms: float = 0.0
    idle_s: float = 0.0
    calls: int = 0  # that were answered


class Look(Struct, frozen=True):
    """What one look at the instances of a deployment found, summed up from the beginning of the gauge."""

    at: float  # seconds, monotonic
    counters: Counters
    busy_s: float
    in_flight: int


class Gauge:
    """Measures one deployment. `window_s`: how far back it looks."""

    def __init__(self, window_s: float, now: float) -> None:
        self._window_s = window_s
        self._known: dict[str, Probe] = {}  # instance -> its last counters
        self._looks: deque[Look] = deque()
        self._last_call = now
        self._done, self._busy = 0.0, 0.0  # calls and busy seconds, the older the less
        self._knocks: dict[str, float] = {}  # caller -> when a call of it was refused last for want of an instance
        self._counters, self._busy_s = Counters(), 0.0

    def knock(self, caller: str, now: float) -> None:
        """A call came while there was no instance. However often a caller tries again, it counts as one call."""
        self._last_call = now
        self._knocks[caller] = now

    def look(self, probes: Mapping[str, Probe], now: float) -> Load:
        """The load after one more look. An instance that did not answer is left out, and counts when it answers again."""
        for name, probe in probes.items():
            known = self._known.get(name)
            if known is not None and probe.answered < known.answered:  # it began anew under the same name
                known = None
            if known is None and (not self._looks or probe.uptime_s > now - self._looks[-1].at):  # what it did before is not new
                known = probe
            before = Counters.of(known) if known else Counters()
            self._counters = self._counters.plus(Counters.of(probe).since(before))
            self._busy_s += max(probe.busy_s - (known.busy_s if known else 0.0), 0.0)
            self._known[name] = probe
        self._known = {name: probe for name, probe in self._known.items() if name in probes}
        in_flight = [probe.in_flight for probe in probes.values()]
        look = Look(now, self._counters, self._busy_s, sum(in_flight))
        if look.in_flight or (self._looks and look.counters.calls > self._looks[-1].counters.calls):
            self._last_call = now
        if self._looks:
            last = self._looks[-1]
            fades = exp((last.at - now) / (MEMORY * self._window_s))
            self._done = fades * self._done + look.counters.calls - last.counters.calls
            self._busy = fades * self._busy + look.busy_s - last.busy_s
        self._looks.append(look)
        while len(self._looks) > 2 and self._looks[1].at <= now - self._window_s:
            self._looks.popleft()
        self._knocks = {caller: at for caller, at in self._knocks.items() if at > now - self._window_s}
        return self._load(look, sum(max(n - 1, 0) for n in in_flight), now)

    def _load(self, look: Look, waiting: int, now: float) -> Load:
        first = self._looks[0]
        took = max(now - first.at, 1.0)
        done = look.counters.since(first.counters)
        came = max(done.calls + look.in_flight - first.in_flight, 0) + len(self._knocks)  # of the first look nothing is known
        rate = self._done / self._busy if self._busy > 0 else 0.0
        return Load(came / took, waiting + len(self._knocks), rate, done.quantile_ms(0.99), now - self._last_call, done.calls)
