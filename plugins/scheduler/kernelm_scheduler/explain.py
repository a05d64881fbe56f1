"""Why a job waits or can never run, in words for people, and what would start it."""

import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.scheduler import PendingJob
from kernelm_scheduler.amounts import any_of, listed, shortage, words
from kernelm_scheduler.index import Index
from kernelm_scheduler.queue import Ask
from kernelm_scheduler.quotas import Ledger
from kernelm_scheduler.room import Room
from kernelm_sdk.system import Resources

SMALL = 3  # candidates up to which each is named; beyond, the words do not change whenever a node does


def impossible(ask: Ask, index: Index, ledger: Ledger) -> str:
    """Why such a job can never run on these nodes under these quotas, however long it waits; "" if it may."""
    request = ask.request
    if request.cpu < 0 or request.memory_mb < 0 or request.gpus < 0:
        return f"asks for a negative amount: {words(request)}, {request.gpus} GPUs"
    if ask.members < 1:
        return f"asks for {ask.members} members"
    known = (index.generation, index.quotas, index.tenants)
    if ask.never is None or ask.never[0] != known:
        ask.never = known, ledger.never(ask.tenant, ask.whole) or _too_small(ask, index)
    return ask.never[1]


def _too_small(ask: Ask, index: Index) -> str:
    if not index.nodes:
        return ""
    if ask.members == 1:
        if any(index.hosts(ask, type).any() for type in index.options(ask)):
            return ""
        short = [f"{s} in all" for n in index.names if (s := shortage(ask.request, index.nodes[n].capacity, f"node {n}"))]
        if len(short) == len(index.names):
            return "can never run: " + listed(short)
        return f"can never run: no node has {_devices(ask)}"
    room = Room(index)
    for type in index.options(ask):
        bare = Ask(ask.request, (), ask.tenant, ask.members, ask.types, ask.device_mb, ask.within)  # of any plugin
        if room.gang(bare, ask.members, type, "", index.capacity, slots=False):
            return ""
    where = {"": "all nodes together hold", "node": "no node holds", "link": "no group behind one link holds"}[ask.within]
    more = " fewer" if not ask.within else ""
    return f"can never run: {where}{more} {'than ' if more else ''}{ask.members} members of {words(ask.request)}"


def _devices(ask: Ask) -> str:
    types = " or ".join(t for t in ask.types if t) or "any type"
    memory = f" with {ask.device_mb} MiB" if ask.device_mb else ""
    return f"{ask.request.gpus} devices of {types}{memory}"


def waits(job: PendingJob, ask: Ask, index: Index, room: Room) -> tuple[str, str]:
    """Why the job can't start now, and what would start it."""
    if not index.nodes:
        return "waits: no node has reported", "a node that reports"
    if ask.members > 1 and 0 < (crew := room.crew(ask)) < ask.members:
        whoever, more = any_of(ask.plugins), ask.members - crew
        return f"waits: needs {ask.members} instances of {whoever} at once, and there are {crew}", f"start {more} more of {whoever}"
    if ask.summary is not None and ask.summary[0] == index.generation:
        return ask.summary[1]
    able = np.zeros(len(index.names), dtype=bool)
    for type in index.options(ask):
        able |= index.candidates(ask, type)
    if able.sum() > SMALL or ask.members > 1:
        ask.summary = index.generation, _summary(ask, room, able)
        return ask.summary[1]
    rows = [int(i) for i in np.flatnonzero(able)]
    obstacles = [_obstacle(ask, index, room, i) for i in rows]
    return "waits: " + listed(text for text, _ in obstacles), "; or ".join(dict.fromkeys(remedy for _, remedy in obstacles))


def misses(probe: PendingJob, ask: Ask, index: Index, ledger: Ledger, room: Room) -> tuple[str, str]:
    """As `waits`, of a served model's replica: where no node could ever hold it, another one may come."""
    if index.nodes and not any(p in room.slots and (room.slots[p] >= 0).any() for p in ask.plugins):
        return f"waits: no node that is there has the plugin that serves {probe.name}", "a node with that plugin"
    if never := impossible(ask, index, ledger):
        return f"waits: {never.removeprefix('can never run: ')}", "a larger node, or a larger quota"
    return waits(probe, ask, index, room)


def _obstacle(ask: Ask, index: Index, room: Room, row: int) -> tuple[str, str]:
    name, whoever = index.names[row], any_of(ask.plugins)
    slots = [room.slots[p][row] for p in ask.plugins if p in room.slots and room.slots[p][row] >= 0]
    if not slots:
        return f"no plugin of {whoever} is ready on node {name}", f"start {whoever} on node {name}"
    if max(slots) <= 0:
        return f"every instance of {whoever} on node {name} is at work", f"a job there ends, or another instance of {whoever}"
    free = [float(x) for x in room.free[row, :3]]
    if short := shortage(ask.request, Resources(free[0], int(free[1]), int(free[2])), f"node {name}"):
        return f"{short} free", f"jobs on node {name} end, or a node with room"
    types = [index.column[t] for t in index.options(ask) if t in index.column]
    if ask.request.gpus > 0 and types and all(room.free[row, t] < ask.request.gpus for t in types):
        return f"node {name} has fewer than {_devices(ask)} free", f"jobs on node {name} end, or a node with room"
    return f"node {name} is kept for a job that is older or higher", "that job starts, or this one's run time is known and short"


def _summary(ask: Ask, room: Room, able: NDArray[np.bool_]) -> tuple[str, str]:
    whoever = any_of(ask.plugins)
    what = f"{ask.members} times {words(ask.request)}" if ask.members > 1 else words(ask.request)
    what += f" and {_devices(ask)}" if ask.request.gpus else ""
    ready = np.zeros(len(able), dtype=bool)
    for plugin in ask.plugins:
        ready |= room.slots[plugin] >= 0 if plugin in room.slots else False
    served = int((able & ready).sum())
    if not served:
        return f"waits: no plugin of {whoever} is ready on any node that could hold it", f"start {whoever}"
    together = ", all at once" if ask.members > 1 else ""
    several = f"{served} nodes together have" if served > 1 else "the one node there is has"
    nodes = f"none of {served} nodes has" if ask.members == 1 else f"{several} not"
    return f"waits: needs {what}{together}, {nodes} that free, beside what older or higher jobs wait for", \
        f"jobs end there, more nodes, or more instances of {whoever}"  # fmt: skip
