"""In what order waiting jobs are taken.

A job's place is a moment that never changes while it waits: its submission, earlier by `aging_s` for every step of priority,
later by `stretch` times its run time. Who is submitted after that moment of another job with nothing in its favour comes behind it,
so everybody is overtaken only by finitely many, and the bound is known beforehand: `overtaken_until`.
"""

from kernelm_contracts.scheduler import PendingJob
from kernelm_scheduler.amounts import duration, left_s
from kernelm_scheduler.settings import Settings

Rank = tuple[float, float, str]


def rank(job: PendingJob, settings: Settings) -> Rank:
    """Lower goes first."""
    later = settings.stretch * min(left_s(job), settings.stretch_s) if settings.stretch else 0.0
    return job.submitted - job.priority * settings.aging_s + later, job.submitted, job.id


def urgent(job: PendingJob, now: float, settings: Settings) -> bool:
    """Whether the job meets its deadline only if it starts soon: within its own run time again, or `aging_s`."""
    slack = job.deadline - now - left_s(job)
    return job.deadline > 0 and 0 <= slack <= max(left_s(job), settings.aging_s)


def effective(job: PendingJob, now: float, settings: Settings) -> Rank:
    """`rank`, for an urgent job earlier by `urgency_s`: bounded too. Urgent jobs of one rank go by the deadline."""
    place, submitted, id = rank(job, settings)
    return (place - settings.urgency_s, submitted, id) if urgent(job, now, settings) else (place, submitted, id)


def overtaken_until(job: PendingJob, lead: int, settings: Settings) -> float:
    """Unix seconds from which on nobody who is submitted comes before the job, if no priority is higher by more than `lead`."""
    return rank(job, settings)[0] + (job.priority + lead) * settings.aging_s + settings.urgency_s


def too_late(job: PendingJob, now: float) -> str:
    """A word on a deadline that can't be met any more; "" for none."""
    if job.deadline <= 0 or now + left_s(job) <= job.deadline:
        return ""
    return f"; its deadline can't be met any more, by {duration(now + left_s(job) - job.deadline)}"
