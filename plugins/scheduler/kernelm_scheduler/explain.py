"""Why a job waits or can never run, in words for people, and what would start it."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.deployments import WAITS
from kernelm_contracts.scheduler import PendingJob
from kernelm_scheduler.amounts import CPU_TOLERANCE, amount_of, any_of, cores, listed, shortage, size, words
from kernelm_scheduler.index import Index
from kernelm_scheduler.queue import Ask
from kernelm_scheduler.quotas import NOTHING, Ledger
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


def waits(job: PendingJob, ask: Ask, index: Index, room: Room, model: str = "") -> tuple[str, str]:
    """Why the job (or the replica of `model`) can't start now, and what would start it."""
    if not index.nodes:
        return f"{WAITS}no node has reported", "a node that reports"
    if ask.members > 1 and 0 < (crew := room.crew(ask)) < ask.members:
        whoever, more = any_of(ask.plugins), ask.members - crew
        return f"{WAITS}needs {ask.members} instances of {whoever} at once, and there are {crew}", f"start {more} more of {whoever}"
    if ask.summary is not None and ask.summary[0] == index.generation:
        return ask.summary[1]
    able = np.zeros(len(index.names), dtype=bool)
    for type in index.options(ask):
        able |= index.candidates(ask, type)
    if able.sum() > SMALL or ask.members > 1:
        ask.summary = index.generation, _summary(ask, room, able)
        return ask.summary[1]
    rows = [int(i) for i in np.flatnonzero(able)]
    obstacles = [_obstacle(ask, index, room, i, model) for i in rows]
    return WAITS + listed(text for text, _ in obstacles), "; or ".join(dict.fromkeys(remedy for _, remedy in obstacles))


def misses(probe: PendingJob, ask: Ask, index: Index, ledger: Ledger, room: Room) -> tuple[str, str]:
    """As `waits`, of a served model's replica: where no node could ever hold it, another one may come."""
    if index.nodes and not any(p in room.slots and (room.slots[p] >= 0).any() for p in ask.plugins):
        return f"{WAITS}no node that is there has the plugin that serves {probe.name}", \
            "a node with that plugin: `kernelm ps` says which nodes are there, `kernelm plugin list` which plugins"  # fmt: skip
    if never := impossible(ask, index, ledger):
        return f"{WAITS}{never.removeprefix('can never run: ')}", "a larger node, or a larger quota"
    return waits(probe, ask, index, room, probe.name)


def _obstacle(ask: Ask, index: Index, room: Room, row: int, model: str) -> tuple[str, str]:
    name, whoever = index.names[row], any_of(ask.plugins)
    slots = [room.slots[p][row] for p in ask.plugins if p in room.slots and room.slots[p][row] >= 0]
    if not slots:
        return _absent(ask, f"on node {name}")
    if max(slots) <= 0:
        return f"every instance of {whoever} on node {name} is at work", f"a job there ends, or another instance of {whoever}"
    free = [float(x) for x in room.free[row, :3]]
    if short := shortage(ask.request, Resources(free[0], int(free[1]), int(free[2])), f"node {name}"):
        column = next((c for c in range(3) if index.need(ask, "")[c] > room.free[row, c] + CPU_TOLERANCE), 0)
        return f"{short} free", f"{_ends(ask, index, room, row, column, model)}, or a node with room"
    types = [index.column[t] for t in index.options(ask) if t in index.column]
    if ask.request.gpus > 0 and types and all(room.free[row, t] < ask.request.gpus for t in types):
        ends = _ends(ask, index, room, row, types[0], model)
        return f"node {name} has fewer than {_devices(ask)} free", f"{ends}, or a node with room"
    return f"node {name} is kept for a job that is older or higher", "that job starts, or this one's run time is known and short"


def _absent(ask: Ask, where: str) -> tuple[str, str]:
    """That nobody who could do it is there, and how to find out why. Who asks names the contract where no plugin is known."""
    whoever = any_of(ask.plugins)
    if "/" in whoever:
        return f"no plugin that implements {whoever} is ready {where}", (
            f"a plugin that implements {whoever} gets ready there: `kernelm plugin list` says which do, `kernelm ps --all` and "
            "`kernelm doctor` why none is ready")  # fmt: skip
    return f"plugin {whoever} is not ready {where}", (
        f"plugin {whoever} gets ready there: `kernelm plugin list` says whether it runs at all, `kernelm ps --all` and "
        "`kernelm doctor` why it is not ready")  # fmt: skip


def _ends(ask: Ask, index: Index, room: Room, row: int, column: int, but: str) -> str:
    """What has to end on the node before it has enough of a column for the ask: jobs, or served models (none of which is `but`),
    which do not end by themselves."""
    name, served = index.names[row], dict[str, float]()
    for model in sorted(index.models.keys() - {but}):
        shares = tuple(share for share in index.models[model].allocation if share.node == name)
        held = sum(float(amount[column]) for _, amount, _ in index.amounts(index.models[model].request, shares))
        served |= {model: held} if held > 0 else {}
    by_models, free = sum(served.values()), float(room.free[row, column])
    by_jobs = float(index.capacity[row, column]) - free - by_models
    lacking = float(index.need(ask, index.types[column - 3] if column > 2 else "")[column]) - free - CPU_TOLERANCE
    jobs = f"jobs on node {name} end"
    if not served:
        return jobs
    amount = (cores(by_models), f"{by_models:.0f} MiB", f"{by_models:.0f} GPUs")[min(column, 2)]
    models = _undeployed(served, f", with {amount} on node {name},")
    enough = [text for text, held in ((jobs, by_jobs), (models, by_models)) if held >= lacking]
    return ", or ".join(enough) or f"{jobs} and {models}"


def _undeployed(models: Mapping[str, float], which: str) -> str:
    """That served models are taken away; those that hold most are named."""
    names = sorted(models, key=lambda name: (-models[name], name))
    if len(names) == 1:
        return f"deployment {names[0]}{which} is taken away (`kernelm model undeploy {names[0]}`)"
    more = f" and {len(names) - SMALL} more" if len(names) > SMALL else ""
    return f"one or more of the deployments {', '.join(names[:SMALL])}{more}{which} are taken away (`kernelm model undeploy`)"


def lacks(ask: Ask, index: Index, ledger: Ledger) -> tuple[str, str] | None:
    """What the tenant's quota is short of for the ask, and what would help; None if it is not."""
    if not (short := ledger.shortage(ask.tenant, ask.whole)):
        return None
    asked = [n for n, amount in enumerate(ask.whole) if amount > 0]
    held, served = dict.fromkeys(asked, 0.0), dict[str, float]()
    for model in (index.models[name] for name in sorted(index.models) if index.models[name].tenant == ask.tenant):
        amounts = amount_of(model.request, size(model.allocation))
        for n in asked:
            held[n] += amounts[n]
        served |= {model.name: amounts[0]} if any(amounts[n] > 0 for n in asked) else {}
    jobs = any(ledger.held.get(ask.tenant, NOTHING)[n] > held[n] + CPU_TOLERANCE for n in asked)
    ends = [f"jobs of tenant {ask.tenant} end"] if jobs or not served else []
    ends += [_undeployed(served, f" of tenant {ask.tenant}")] if served else []
    return f"{WAITS}{short}", ", or ".join([*ends, "a larger quota"])


def _summary(ask: Ask, room: Room, able: NDArray[np.bool_]) -> tuple[str, str]:
    whoever = any_of(ask.plugins)
    what = f"{ask.members} times {words(ask.request)}" if ask.members > 1 else words(ask.request)
    what += f" and {_devices(ask)}" if ask.request.gpus else ""
    ready = np.zeros(len(able), dtype=bool)
    for plugin in ask.plugins:
        ready |= room.slots[plugin] >= 0 if plugin in room.slots else False
    served = int((able & ready).sum())
    if not served:
        why, remedy = _absent(ask, "on any node that could hold it")
        return f"{WAITS}{why}", remedy
    together = ", all at once" if ask.members > 1 else ""
    several = f"{served} nodes together have" if served > 1 else "the one node there is has"
    nodes = f"none of {served} nodes has" if ask.members == 1 else f"{several} not"
    return f"{WAITS}needs {what}{together}, {nodes} that free, beside what older or higher jobs wait for", \
        f"jobs or deployments there end, more nodes, or more instances of {whoever}"  # fmt: skip
