"""What the counters of a `Probe` say: differences, quantiles, and whether a new pool is worse than the one before. Pure."""

from msgspec import Struct

from kernelm_sdk.system import Bounds, Probe


class Counters(Struct, frozen=True):
    """Calls since an instance began, or between two looks at it."""

    calls: int = 0
    failed: int = 0
    latency: tuple[int, ...] = ()  # as in `Probe.latency`

    @classmethod
    def of(cls, probe: Probe) -> "Counters":
        return cls(probe.answered, probe.failed, probe.latency)

    def plus(self, other: "Counters", sign: int = 1) -> "Counters":
        """Two instances together."""
        size = max(len(self.latency), len(other.latency))
        a, b = (c.latency + (0,) * (size - len(c.latency)) for c in (self, other))
        return Counters(max(self.calls + sign * other.calls, 0), max(self.failed + sign * other.failed, 0),
                        tuple(max(x + sign * y, 0) for x, y in zip(a, b, strict=True)))  # fmt: skip

    def since(self, before: "Counters") -> "Counters":
        """What was added since `before`; an instance that began anew in between counts for less, never below nothing."""
        return self.plus(before, -1)

    @property
    def error_rate(self) -> float:
        return self.failed / self.calls if self.calls else 0.0

    def quantile_ms(self, q: float) -> float:
        """An upper bound of the latency's quantile, exact to a factor of two; 0 without calls."""
        wanted, seen = q * sum(self.latency), 0
        for k, count in enumerate(self.latency):
            seen += count
            if count and seen >= wanted:
                return float(2**k / 16)
        return 0.0

    @property
    def text(self) -> str:
        return f"{self.calls} calls, {self.error_rate:.2%} failed, p99 at most {self.quantile_ms(0.99):g} ms"


def too_bad(new: Counters, old: Counters, bounds: Bounds) -> str:
    """Why a new pool with the counters `new` must not stay, beside `old`; "" while there is no reason, or too few calls."""
    if new.calls < bounds.min_calls:
        return ""
    if new.error_rate > old.error_rate + bounds.error_rate:
        return (f"{new.error_rate:.1%} of {new.calls} calls failed, {old.error_rate:.1%} of {old.calls} before: more than "
                f"{bounds.error_rate:.1%} beyond")  # fmt: skip
    p99, limit = new.quantile_ms(0.99), max(old.quantile_ms(0.99) * bounds.latency_ratio, bounds.latency_ms)
    # the histogram's steps are factors of two: only beyond the next step is it surely slower
    if old.calls >= bounds.min_calls and p99 / 2 >= limit:
        return (f"p99 is over {p99 / 2:g} ms, and at most {old.quantile_ms(0.99):g} ms before: more than "
                f"{bounds.latency_ratio:g} times that")  # fmt: skip
    return ""
