"""How fast a job gets on, as a function of what it runs on and how far it is.

Progress is counted in a unit of the job's own. On one placement (devices of one type, so many on each node) a job's speed is
constant between two *bounds* of its progress (epochs, where the gradient noise was measured), so that the time from any
progress to any other is a look-up in a piecewise linear table, the `Pace`. Nothing here knows of clusters or schedulers.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

Placement = tuple[int, ...]  # members on each node, fewest first


@dataclass(frozen=True)
class Pace:
    """`times[i]` seconds of work lead to progress `bounds[i]`; both begin with 0 and grow."""

    bounds: tuple[float, ...]
    times: tuple[float, ...]

    def time(self, progress: float) -> float:
        """Seconds of work from the beginning to `progress`."""
        return _between(progress, self.bounds, self.times)

    def progress(self, time: float) -> float:
        """Where `time` seconds of work lead."""
        return _between(time, self.times, self.bounds)

    def speed(self, progress: float) -> float:
        """Progress per second at `progress`."""
        i = min(bisect_right(self.bounds, progress), len(self.bounds) - 1)
        return (self.bounds[i] - self.bounds[i - 1]) / (self.times[i] - self.times[i - 1])

    @property
    def total(self) -> float:
        """Seconds of work in all."""
        return self.times[-1]


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear interpolation; beyond the ends the end."""
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    i = bisect_right(xs, x)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


class Work(Protocol):
    """What a job has to do."""

    restart_s: float  # from stopping at a checkpoint to being at work again; also the first start

    @property
    def total(self) -> float:
        """Progress at which it is done."""
        ...

    def types(self) -> tuple[str, ...]:
        """Device types it can run on; () for any, at one speed."""
        ...

    def fits(self, type: str, placement: Placement) -> bool:
        """Whether it can run so."""
        ...

    def pace(self, type: str, placement: Placement) -> Pace:
        """How it gets on there; only asked where it fits."""
        ...

    def stage(self, progress: float) -> int:
        """The part of the work that `progress` lies in; speeds are constant within one."""
        ...


@dataclass
class FixedWork:
    """Work of traces that tell only how long a job ran: `seconds` with `members`, however it is placed, in proportion to
    `speeds` of the device types (1 where a type is not named). With other than `members` members, Amdahl's law with
    `serial` as the part of the time that does not shrink."""

    seconds: float
    members: int = 1
    speeds: dict[str, float] = field(default_factory=dict)
    serial: float = 0.0
    restart_s: float = 0.0
    _paces: dict[tuple[str, int], Pace] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> float:
        return self.seconds

    def types(self) -> tuple[str, ...]:
        return tuple(self.speeds)

    def fits(self, type: str, placement: Placement) -> bool:
        return not self.speeds or type in self.speeds

    def pace(self, type: str, placement: Placement) -> Pace:
        key = (type, sum(placement))
        if key not in self._paces:
            share = self.members / key[1]
            factor = (self.serial + (1 - self.serial) * share) / self.speeds.get(type, 1.0)
            self._paces[key] = Pace((0.0, self.seconds), (0.0, self.seconds * factor))
        return self._paces[key]

    def stage(self, progress: float) -> int:
        return 0
