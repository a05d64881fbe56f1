"""Which candidate wins, and whether its int8 variant is kept. Pure functions of what was measured.

Accuracies are shares of correct documents on the validation split (0 to 1), latencies milliseconds a document.
"""

from msgspec import Struct

from kernelm_contracts.server import Measurement

OBJECTIVES = ("accuracy", "latency", "size")
# Accuracies are quotients of small whole numbers: 0.98 - 0.975 must count as a fall of 0.005 despite rounding.
ROUNDING = 1e-9


class Figures(Struct, frozen=True):
    """What the choice looks at, of one measured model."""

    name: str
    accuracy: float  # 0 to 1
    latency_ms: float
    bytes: int


def figures(name: str, measurement: Measurement) -> Figures:
    """The figures of `name`, out of its measurement."""
    return Figures(name, measurement.scores.accuracy, measurement.latency_ms, measurement.bytes)


def rank(measured: tuple[Figures, ...], objective: str, max_drop: float) -> tuple[Figures, ...]:
    """All of `measured`, best first.

    "accuracy": the most accurate; among equals the one with the lower latency. "latency" and "size": the fastest or
    smallest of those within `max_drop` of the best accuracy, then the others by accuracy. Names break what ties remain,
    so that the order of the candidates never decides.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    if not measured:
        return ()
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
