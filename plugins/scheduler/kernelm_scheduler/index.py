"""The state of the cluster in the form in which it is decided on, kept from round to round and changed by deltas.

An `Index` that was made by deltas gives the same decisions as one made of the whole state at once: sums are exact (fractions) and
do not depend on an order, nodes lie by name, jobs by rank. `tests/test_index.py` shows it for any sequence of changes.
"""

from bisect import insort
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.deltas import changes
from kernelm_contracts.scheduler import (
    Action,
    ClusterDelta,
    ClusterState,
    ModelState,
    NodeState,
    PlacedJob,
    Share,
    Tenant,
)
from kernelm_scheduler.amounts import CPU_TOLERANCE, Amount, allocation_of, plannable, size
from kernelm_scheduler.ends import Ends
from kernelm_scheduler.hooks import Scoring
from kernelm_scheduler.queue import Answers, Ask, Queue
from kernelm_scheduler.settings import Settings
from kernelm_scheduler.victims import Victims
from kernelm_sdk.system import Resources

Matrix = NDArray[np.float64]


class Index:
    """Nodes as rows of arrays; columns: cores, MiB, GPUs, then the devices of each type."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.scoring: Scoring | None = None  # of distributions that are installed
        self.version, self.now, self.source = 0, 0.0, ""
        self.nodes: dict[str, NodeState] = {}
        self.queue, self.answers = Queue(settings), Answers()
        self.placed: dict[str, PlacedJob] = {}
        self.models: dict[str, ModelState] = {}
        self.quotas: dict[str, Resources] = {}
        self.tenants: tuple[Tenant, ...] = ()
        self.actions: frozenset[Action] = frozenset()
        self.victims = Victims(settings.preemption)
        self.elastic: set[str] = set()  # placed jobs that can use more members than the fewest
        self.leaving: set[str] = set()  # placed jobs that were told to stop
        self.estimated: set[str] = set()  # placed jobs whose end may be reckoned, from now on
        self.measured: set[str] = set()  # placed jobs with a speed-up curve
        self.plannable: set[str] = set()  # jobs that are sized together
        self.held: dict[str, Amount] = {}
        self.spread: dict[str, Matrix] = {}  # tenant -> its jobs on each node
        self.generation = 0  # grows when nodes change in more than what is free
        self._held: dict[str, tuple[Fraction, int, int]] = {}  # tenant -> cores, MiB, GPUs
        self._layout((), ())

    @classmethod
    def of(cls, state: ClusterState, settings: Settings) -> "Index":
        index = cls(settings)
        index.apply(changes(None, state))
        return index

    # ---- changes ----

    def apply(self, delta: ClusterDelta) -> None:
        """Go on to the version of `delta`, which must be based on ours."""
        self.version, self.now, self.source = delta.version, delta.now, delta.source
        self.quotas = self.quotas if delta.quotas is None else delta.quotas
        self.tenants = self.tenants if delta.tenants is None else delta.tenants
        self.actions = self.actions if delta.actions is None else frozenset(delta.actions)
        self._change_nodes(delta.nodes, delta.gone_nodes)
        for id in chain(delta.gone, (j.id for j in delta.pending), (j.id for j in delta.placed)):
            self._drop_placed(id)
        self.queue.drop(dict.fromkeys([*delta.gone, *(j.id for j in delta.pending), *(j.id for j in delta.placed)]))
        for job in delta.placed:
            self._add_placed(job)
        self.queue.add(delta.pending)
        self.plannable.update(job.id for job in delta.pending if plannable(job))
        for name in (*delta.gone_models, *(m.name for m in delta.models)):
            if old := self.models.pop(name, None):
                self._hold(old.tenant, old.request, old.allocation, -1)
        for model in delta.models:
            self.models[model.name] = model
            self._hold(model.tenant, model.request, model.allocation, 1)

    def _add_placed(self, job: PlacedJob) -> None:
        self.placed[job.id] = job
        self.victims.add(job)
        reckoned = job.leaving or (job.ends <= 0 and (job.remaining > 0 or job.estimate_s > 0))
        for ids, belongs in ((self.measured, bool(job.speeds)), (self.plannable, plannable(job)), (self.leaving, job.leaving),
                             (self.elastic, job.most > job.members), (self.estimated, reckoned)):  # fmt: skip
            if belongs:
                ids.add(job.id)
        self._ends(job)
        self._hold(job.tenant, job.request, allocation_of(job), 1)

    def _drop_placed(self, id: str) -> None:
        for ids in (self.measured, self.plannable, self.elastic, self.leaving, self.estimated):
            ids.discard(id)
        if old := self.placed.pop(id, None):
            self.ends.drop(id)
            self.victims.drop(old)
            self._hold(old.tenant, old.request, allocation_of(old), -1)

    def _ends(self, job: PlacedJob) -> None:
        if job.ends > 0 and not job.leaving:
            self.ends.add(job.id, job.ends, ((row, amount) for row, amount, _ in self.amounts(job.request, allocation_of(job))))

    def _hold(self, tenant: str, request: Resources, shares: tuple[Share, ...], sign: int) -> None:
        cpu, memory_mb, gpus = self._held.get(tenant, (Fraction(), 0, 0))
        n = sign * size(shares)
        self._held[tenant] = held = cpu + n * _exactly(request.cpu), memory_mb + n * request.memory_mb, gpus + n * request.gpus
        self.held[tenant] = float(held[0]), float(held[1]), float(held[2])
        self._count(tenant, shares, float(sign))

    def _count(self, tenant: str, shares: Iterable[Share], sign: float) -> None:
        if tenant not in self.spread:
            self.spread[tenant] = np.zeros(len(self.names))
        for share in shares:
            if (row := self.row.get(share.node)) is not None:
                self.spread[tenant][row] += sign

    # ---- nodes ----

    def _change_nodes(self, changed: tuple[NodeState, ...], gone: tuple[str, ...]) -> None:
        layout = (self.names, self.types)
        for name in gone:
            self.nodes.pop(name, None)
        before = {node.name: self.nodes.get(node.name) for node in changed}
        self.nodes.update({node.name: node for node in changed})
        if any(old is None for old in before.values()) or gone or any(
            d.type not in self.column for node in changed for d in node.devices
        ):
            types = tuple(sorted({d.type for node in self.nodes.values() for d in node.devices}))
            self._layout(tuple(sorted(self.nodes)), types)
        for node in changed if (self.names, self.types) == layout else self.nodes.values():
            old = before.get(node.name)
            if old is None or (old.capacity, old.plugins.keys(), _built(old)) != (node.capacity, node.plugins.keys(), _built(node)):
                self.generation += 1
            self._fill(self.row[node.name], node)

    def _layout(self, names: tuple[str, ...], types: tuple[str, ...]) -> None:
        self.generation += 1
        self.names, self.types = names, types
        self.row = {name: i for i, name in enumerate(names)}
        self.column = {type: 3 + i for i, type in enumerate(types)}
        shape = (len(names), 3 + len(types))
        self.capacity: Matrix = np.zeros(shape)
        self.scale: Matrix = np.ones((len(names), 4))  # of a score: the first three columns of `capacity`, and how many are not 0
        self.plain: list[tuple[float, ...]] = [(1.0,) * 4] * len(names)  # the same in plain numbers
        self.free: Matrix = np.zeros(shape)
        self.device_mb: Matrix = np.zeros(shape)
        self.untyped: NDArray[np.bool_] = np.ones(len(names), dtype=bool)
        self.slots: dict[str, Matrix] = {}
        self.links: dict[str, list[int]] = {}
        self.caches: dict[str, dict[int, float]] = {}  # digest -> row -> how near: 0.5 in the cache, 1 loaded
        self.spread, self.ends = {}, Ends(3 + len(types))
        for held in chain(self.placed.values(), self.models.values()):
            self._count(held.tenant, allocation_of(held) if isinstance(held, PlacedJob) else held.allocation, 1.0)
        for job in self.placed.values():
            self._ends(job)
        self._links: list[tuple[str, ...]] = [()] * len(names)
        self._digests: list[tuple[str, ...]] = [()] * len(names)

    def _fill(self, i: int, node: NodeState) -> None:
        for matrix, resources in ((self.capacity, node.capacity), (self.free, node.free)):
            matrix[i, :3] = resources.cpu, resources.memory_mb, resources.gpus
            matrix[i, 3:] = 0.0
        has = (node.capacity.cpu, float(node.capacity.memory_mb), float(node.capacity.gpus))
        self.plain[i] = (*(amount if amount > 0 else np.inf for amount in has), max(sum(amount > 0 for amount in has), 1))
        self.scale[i] = self.plain[i]
        for devices in node.devices:
            column = self.column[devices.type]
            self.capacity[i, column], self.free[i, column] = devices.count, devices.free
            self.device_mb[i, column] = devices.memory_mb or np.inf
        self.untyped[i] = not node.devices
        for plugin in self.slots.keys() - node.plugins.keys():
            self.slots[plugin][i] = -1.0  # is not there at all
        for plugin, count in node.plugins.items():
            if plugin not in self.slots:
                self.slots[plugin] = np.full(len(self.names), -1.0)
            self.slots[plugin][i] = count
        links = tuple(sorted({d.link for d in node.devices if d.link}))
        if links != self._links[i]:
            for link in self._links[i]:
                self.links[link].remove(i)
            for link in links:
                insort(self.links.setdefault(link, []), i)
            self._links[i] = links
        self._cache(i, node)

    def _cache(self, i: int, node: NodeState) -> None:
        for digest in self._digests[i]:
            self.caches[digest].pop(i, None)
            if not self.caches[digest]:
                del self.caches[digest]
        for digest in node.artifacts:
            self.caches.setdefault(digest, {})[i] = 0.5
        for digest in node.models:
            self.caches.setdefault(digest, {})[i] = 1.0
        self._digests[i] = tuple(dict.fromkeys((*node.artifacts, *node.models)))

    # ---- what an ask needs of a node ----

    def amounts(self, request: Resources, shares: tuple[Share, ...]) -> list[tuple[int, Matrix, int]]:
        """(row, amounts by column, members) of each share on a node that is there."""
        result = []
        for share in shares:
            if (row := self.row.get(share.node)) is None:
                continue
            amount = np.zeros(3 + len(self.types))
            amount[:3] = request.cpu, request.memory_mb, request.gpus
            if request.gpus > 0 and share.type in self.column:
                amount[self.column[share.type]] = request.gpus
            result.append((row, amount * share.members, share.members))
        return result

    def options(self, ask: Ask) -> tuple[str, ...]:
        """Types of devices that the ask may use, the best first."""
        if ask.request.gpus <= 0:
            return ask.types[:1] or ("",)
        wanted = ask.types or (*self.types, "")
        return tuple(dict.fromkeys(t for known in wanted for t in ((*self.types, "") if known == "" else (known,))))

    def need(self, ask: Ask, type: str) -> Matrix:
        """Of one member, by column; the tolerance is taken off."""
        need = np.zeros(3 + len(self.types))
        need[:3] = ask.request.cpu, ask.request.memory_mb, ask.request.gpus
        if ask.request.gpus > 0 and type in self.column:
            need[self.column[type]] = ask.request.gpus
        return need

    def hosts(self, ask: Ask, type: str) -> NDArray[np.bool_]:
        """The nodes that one member fits on, were they empty."""
        fits = (self.capacity + CPU_TOLERANCE >= self.need(ask, type)).all(axis=1)
        if ask.request.gpus > 0:
            if type in self.column:
                fits &= self.device_mb[:, self.column[type]] >= ask.device_mb
            elif type == "":
                fits &= self.untyped
            else:
                fits &= False
        return fits

    def candidates(self, ask: Ask, type: str) -> NDArray[np.bool_]:
        """Nodes whose capacity suffices, without those to avoid, unless no others that have a plugin are left: then a node on
        which the job has failed is better than none."""
        cached = ask.able.get(type)
        if cached and cached[0] == self.generation:
            return cached[1]
        able = self.hosts(ask, type)
        served = np.zeros(len(self.names), dtype=bool)
        for plugin in ask.plugins:
            if plugin in self.slots:
                served |= self.slots[plugin] >= 0
        kept = able & served
        for name in ask.avoid:
            if name in self.row:
                kept[self.row[name]] = False
        able = kept if kept.any() else able
        ask.able[type] = self.generation, able
        return able


@lru_cache(maxsize=1024)
def _exactly(cpu: float) -> Fraction:
    return Fraction(cpu)


def _built(node: NodeState) -> tuple[tuple[str, int, int, str], ...]:
    return tuple((d.type, d.count, d.memory_mb, d.link) for d in node.devices)
