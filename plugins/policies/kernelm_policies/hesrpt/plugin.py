"""Goodput over unlike accelerators, weighted by what is left: our own, after heSRPT.

For jobs whose speed grows with a power of their devices, the least average completion time is had when each job's speed counts
the more the smaller it is among those that are left (heSRPT: Berg, Vesilo, Harchol-Balter, Performance Evaluation 142, 2020).
Here each job is worth, in one configuration, its speed relative to one device, divided by the root of its remaining work; the
sum is maximized over all types by the same integer program as Sia's. A start or a change costs the restart over the time that
the configuration is likely to last, and must bring `keep` more than that. A job that does not tell what is left counts as having
as much left as it has had.
"""

from typing import Any

from msgspec import Struct

from kernelm_contracts.scheduler import ClusterState, Decisions, Scheduler
from kernelm_policies import elastic
from kernelm_policies.placing import Job, Room, Target, settle
from kernelm_policies.serving import beside_models
from kernelm_sdk.plugin import Plugin


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    exponent: float = 0.5  # of the remaining work: 0 for goodput alone, 1 for shortest first
    keep: float = 0.2  # a present configuration is worth so much more than another
    lasts_s: float = 1200.0  # so long a configuration is reckoned to last, if the job does not end before
    gap: float = 1e-3  # relative distance from the optimum at which the solver may stop
    solver_s: float = 10.0  # most time it may take


class Hesrpt(Plugin, Scheduler):
    Settings = Settings

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        return beside_models(request, lambda state: decide(state, self.settings))


def decide(state: ClusterState, settings: Settings) -> Decisions:
    room = Room(state)
    targets = elastic.best(state, room, lambda job: worth(job, state, room, settings), settings.gap, settings.solver_s)
    return settle(state, targets, "goodput by what is left")


def worth(job: Job, state: ClusterState, room: Room, settings: Settings) -> list[tuple[Target, float]]:
    """(configuration, what it is worth)."""
    found = elastic.configurations(job, room)
    if not found:
        return []
    smallest: dict[str, tuple[int, float]] = {}
    for (type, members), rate in found:
        smallest[type] = min(smallest.get(type, (members, rate)), (members, rate))
    one = sum(rate / members for members, rate in smallest.values()) / len(smallest)  # speed on one device, the mean over types
    left = job.remaining / one if job.speeds and job.remaining > 0 else job.estimate_s or max(job.served_s, 60.0)
    weight, now, values = left**-settings.exponent, elastic.present(job), []
    for target, rate in found:
        lasts = min(left * one / rate + job.restart_s, settings.lasts_s) or 1.0
        cost = min(job.restart_s / lasts, 1.0)
        factor = 1.0 + settings.keep + cost if target == now else 1.0 - cost  # a start costs a restart too
        values.append((target, weight * rate / one * factor))
    return values
