"""Which candidate wins, and whether its int8 variant is kept. Pure functions of what was measured.

Accuracies are shares of correct documents on the validation split (0 to 1), latencies milliseconds a document.
"""

from collections.abc import Mapping, Sequence

from msgspec import Struct

from kernelm_contracts.optimizer import OptimizeRequest
from kernelm_contracts.server import Measurement
from kernelm_contracts.trainer import Scores

OBJECTIVES = ("accuracy", "latency", "size")
# Accuracies are quotients of small whole numbers: 0.98 - 0.975 must count as a fall of 0.005 despite rounding.
ROUNDING = 1e-9


class Figures(Struct, frozen=True):
    """What the choice looks at, of one measured model."""

    name: str
    accuracy: float  # 0 to 1
    latency_ms: float
    bytes: int
    within: bool = True  # all limits


def figures(name: str, measurement: Measurement, request: OptimizeRequest | None = None) -> Figures:
    """The figures of `name`, out of its measurement, and whether they are within the limits of `request`."""
    within = request is None or all(by <= 0 for by in excess(request, measurement).values())
    return Figures(name, measurement.scores.accuracy, measurement.latency_ms, measurement.bytes, within)


def excess(request: OptimizeRequest, measurement: Measurement) -> dict[str, float]:
    """Limit that the request sets -> by how much it is overstepped; 0 or less for not."""
    limits = {"max_latency_ms": measurement.latency_ms, "max_bytes": float(measurement.bytes),
              "max_memory_mb": measurement.memory_mb}  # fmt: skip
    return {name: value - getattr(request, name) for name, value in limits.items() if getattr(request, name)}


def rank(measured: tuple[Figures, ...], objective: str, max_drop: float) -> tuple[Figures, ...]:
    """All of `measured`, best first.

    "accuracy": the most accurate; among equals the one with the lower latency. "latency" and "size": the fastest or
    smallest of those within `max_drop` of the best accuracy, then the others by accuracy. Names break what ties remain,
    so that the order of the candidates never decides. Those that are not within the limits come last, ranked alike.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    if not measured:
        return ()
    outside = tuple(f for f in measured if not f.within)
    if outside and len(outside) < len(measured):
        inside = tuple(f for f in measured if f.within)
        return (*rank(inside, objective, max_drop), *rank(outside, objective, max_drop))
    floor = max(f.accuracy for f in measured) - max_drop - ROUNDING

    def by_accuracy(f: Figures) -> tuple[float, float, int, str]:
        return -f.accuracy, f.latency_ms, f.bytes, f.name

    def by_cost(f: Figures) -> tuple[float, float, float, str]:
        first, second = (f.latency_ms, f.bytes) if objective == "latency" else (f.bytes, f.latency_ms)
        return first, -f.accuracy, second, f.name

    if objective == "accuracy":
        return tuple(sorted(measured, key=by_accuracy))
    good_enough = sorted((f for f in measured if f.accuracy >= floor), key=by_cost)
    return (*good_enough, *sorted((f for f in measured if f.accuracy < floor), key=by_accuracy))


def front(measured: Mapping[str, Measurement], objectives: Sequence[str]) -> tuple[str, ...]:
    """The Pareto front: those that no other one beats in some objective without being worse in another."""
    costs = {name: costs_of(m, objectives) for name, m in measured.items()}
    return tuple(name for name, own in costs.items() if not any(beats(other, own) for other in costs.values()))


def costs_of(m: Measurement, objectives: Sequence[str]) -> tuple[float, ...]:
    """What is to be small, an objective each."""
    values = values_of(m.scores, m)
    return tuple(-values[objective] if objective == "accuracy" else values[objective] for objective in objectives)


def values_of(scores: Scores, measured: Measurement | None) -> dict[str, float]:
    """Objective -> its value, as it is reported; without a measurement those that training tells."""
    values = {"accuracy": scores.accuracy, "loss": scores.loss}
    if measured is not None:
        values |= {"latency": measured.latency_ms, "size": float(measured.bytes), "memory": measured.memory_mb}
    return values


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` costs no more in anything, and less in something."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def reason_against(variant: Figures, winner: Figures, best_accuracy: float, objective: str, max_drop: float) -> str:
    """Why `variant` (int8) does not take the place of `winner`; "" if it does.

    It may lie at most `max_drop` below the best accuracy of the whole search, so that choosing by latency and then
    quantizing can't lose twice as much; and it must bring what the objective asks for (for "accuracy": be faster or
    smaller). `winner` and `variant` come from one interleaved measurement.
    """
    reference = max(best_accuracy, winner.accuracy)
    fall = reference - variant.accuracy
    if fall > max_drop + ROUNDING:
        return f"accuracy falls by {100 * fall:.2f} points, at most {100 * max_drop:.2f} are allowed"
    faster, smaller = variant.latency_ms < winner.latency_ms, variant.bytes < winner.bytes
    if objective == "latency" and not faster:
        return f"no faster: {variant.latency_ms:.2f} ms against {winner.latency_ms:.2f} ms"
    if objective == "size" and not smaller:
        return f"no smaller: {variant.bytes} bytes against {winner.bytes}"
    return "" if faster or smaller else "neither faster nor smaller"
