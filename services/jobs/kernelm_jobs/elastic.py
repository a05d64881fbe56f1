"""Elastic jobs as pure functions: one instance, and between one and `most` times the job's `resources`.

Their members, as the scheduler sees them, are shares of that instance and no instances of their own. A change takes place at a
checkpoint: the job is handed to its instance again, under a new epoch, with other resources.
"""

from typing import Any

from kernelm_contracts.jobs import JobRecord
from kernelm_contracts.scheduler import Point, Speed

WIDE = "wide:"  # before the name of a plugin: members of an elastic job, which are all of one instance
WIDTH = 1000  # members that one instance could be
RATE = 1.0 / 600  # of the work per second and member, where nothing is known
LEAST_S = 5.0  # of work after which a rate is worth something


def is_elastic(job: JobRecord) -> bool:
    return job.spec.most > 1


def fraction(job: JobRecord) -> float:
    """The part of the work that is done."""
    return min(max(job.progress.fraction, 0.0), 1.0)


def terms(job: JobRecord) -> dict[str, Any]:
    """What an elastic job has in the scheduler's eyes that others have not."""
    if not is_elastic(job):
        return {}
    return {"most": job.spec.most, "speeds": curve(job), "done": fraction(job), "remaining": 1.0 - fraction(job)}


def curve(job: JobRecord) -> tuple[Speed, ...]:
    """How fast it gets on, in parts of its work per second, by members. What was not tried is taken to grow with the members
    beyond the nearest that was: so it is tried, and then known."""
    known = {int(members): rate for members, rate in job.rates.items() if rate > 0}
    if not known:
        known = {1: 1.0 / job.spec.estimate_s if job.spec.estimate_s > 0 else RATE}
    points = []
    for members in range(1, job.spec.most + 1):
        nearest = max((m for m in known if m <= members), default=min(known))
        points.append(Point(members, known[nearest] * members / nearest))
    return (Speed("", tuple(points)),)
