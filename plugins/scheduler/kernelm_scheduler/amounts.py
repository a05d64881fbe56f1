"""Amounts of resources: arithmetic, and words for people."""

from collections.abc import Iterable

from kernelm_contracts.scheduler import PendingJob, PlacedJob, Share, Speed
from kernelm_sdk.system import Resources

CPU_TOLERANCE = 1e-6  # cores; sums of decimal fractions are not exact
NODES_SHOWN = 3  # in the reason of a job that waits
Amount = tuple[float, float, float]  # cores, MiB, GPUs


def amount_of(resources: Resources, times: int = 1) -> Amount:
    return resources.cpu * times, float(resources.memory_mb * times), float(resources.gpus * times)


def shortage(request: Resources, room: Resources, whose: str = "") -> str:
    """The first thing that is too little, as "needs 2 cores, node local has 0.9"; "" if the request fits."""
    if request.cpu > room.cpu + CPU_TOLERANCE:
        return f"needs {cores(request.cpu)}, {whose} has {max(room.cpu, 0.0):.3g}"
    if request.memory_mb > room.memory_mb:
        return f"needs {request.memory_mb} MiB, {whose} has {max(room.memory_mb, 0)}"
    if request.gpus > room.gpus:
        return f"needs {request.gpus} GPUs, {whose} has {max(room.gpus, 0)}"
    return ""


def words(resources: Resources) -> str:
    """For people: "1.5 cores and 2048 MiB"."""
    return f"{cores(resources.cpu)} and {resources.memory_mb} MiB"


def cores(cpu: float) -> str:
    return f"{cpu:.3g} core{'' if cpu == 1 else 's'}"


def named(plugin: str) -> str:
    """For people: without what the caller puts before a plugin that is used in a special way ("pool:encoder")."""
    return plugin.rpartition(":")[2]


def any_of(plugins: Iterable[str]) -> str:
    """For people: "encoder or vllm"."""
    return " or ".join(dict.fromkeys(named(plugin) for plugin in plugins)) or "any name"


def listed(reasons: Iterable[str]) -> str:
    shown = list(reasons)
    more = len(shown) - NODES_SHOWN
    return "; ".join(shown[:NODES_SHOWN]) + (f"; and {more} more nodes" if more > 0 else "")


def duration(seconds: float) -> str:
    """For people: "40 s", "3 min", "2.5 h"."""
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---- progress ----------------------------------------------------------------------------------------------------


def speed_at(speed: Speed, members: int) -> float:
    """Progress per second with so many members: linear between the measured points and from nothing to the first one, flat
    beyond the last."""
    below, rate = 0, 0.0
    for count, measured in speed.points:
        if members <= count:
            return rate + (measured - rate) * (members - below) / (count - below) if count > below else measured
        below, rate = count, measured
    return rate


def speed_of(job: PendingJob | PlacedJob, members: int, type: str) -> float:
    """Progress per second of a job; 0 where its curve is not known."""
    return next((speed_at(s, members) for s in job.speeds if not type or s.type in (type, "")), 0.0)


def allocation_of(job: PlacedJob) -> tuple[Share, ...]:
    return job.allocation or (Share(job.node),)


def size(allocation: Iterable[Share]) -> int:
    return sum(share.members for share in allocation)


def plannable(job: PendingJob | PlacedJob) -> bool:
    """Whether enough is known of an elastic job to size it together with others (`goodput.py`)."""
    return job.most > job.members and job.request.gpus > 0 and any(s.type for s in job.speeds)


def left_s(job: PendingJob) -> float:
    """Run time by what is known, with the fewest members on the fastest devices; 0 for not known."""
    if job.remaining > 0 and job.speeds and (rate := max(speed_at(s, job.members) for s in job.speeds)) > 0:
        return job.remaining / rate
    return job.estimate_s


def end_of(job: PlacedJob, now: float) -> float:
    """Unix seconds at which a placed job ends, by what is known; 0 for not known."""
    if job.ends > 0:
        return max(job.ends, now)
    if job.remaining > 0 and job.speeds:
        shares = allocation_of(job)
        if (rate := speed_of(job, size(shares), shares[0].type)) > 0:
            return now + job.remaining / rate
    return now + job.estimate_s if job.estimate_s > 0 else 0.0
