"""Learning curves of a run's trainings, as small as a line of text: "loss 6.21 █▆▄▃▂▁▁ 2.34"."""

from math import isfinite

from kernelm_contracts.jobs import JobRecord

SHOWN = (("loss", "loss"), ("validation_loss", "validation"))  # metric of a job's progress -> how it reads
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # characters of a curve
KEPT = 16 * WIDTH  # points of a curve, twice as many at most


class Curves:
    """Remembers what it was shown: a job's record holds its latest figures alone."""

    def __init__(self) -> None:
        self._points: dict[tuple[str, str], list[tuple[float, float]]] = {}  # job, metric -> step, value

    def take(self, job: JobRecord) -> None:
        """Add the job's latest figures, if they are of another step than those before. An attempt that begins anew, or goes on from
        an earlier checkpoint, takes its place on the curve."""
        metrics = job.progress.metrics
        for metric, _ in SHOWN:
            if metric not in metrics or "step" not in metrics or not isfinite(metrics[metric]):
                continue
            step, value = metrics["step"], metrics[metric]
            points = self._points.setdefault((job.id, metric), [])
            if points and points[-1][1] == value and metric != "loss":  # the same look at the validation split, beside a later step
                continue
            while points and points[-1][0] >= step:
                points.pop()
            points.append((step, value))
            if len(points) >= 2 * KEPT:
                del points[1:-1:2]

    def draw(self, job: str) -> str:
        """The curves of a job; "" while there is none with two points."""
        found = ((name, self._points.get((job, metric), ())) for metric, name in SHOWN)
        return "   ".join(f"{name} {p[0][1]:.4g} {_bars(p)} {p[-1][1]:.4g}" for name, p in found if len(p) > 1)


def _bars(points: list[tuple[float, float]] | tuple[tuple[float, float], ...]) -> str:
    """The mean of each stretch of steps, from the lowest bar to the highest; a stretch without a point is as the one before."""
    first, last = points[0][0], points[-1][0]
    stretches: list[list[float]] = [[] for _ in range(min(WIDTH, len(points)))]
    for step, value in points:
        stretches[min(int((step - first) / max(last - first, 1e-9) * len(stretches)), len(stretches) - 1)].append(value)
    means: list[float] = []
    for values in stretches:
        means.append(sum(values) / len(values) if values else means[-1])
    low, high = min(means), max(means)
    return "".join(BARS[round((m - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for m in means)
