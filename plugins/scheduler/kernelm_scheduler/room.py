"""What is left of the nodes while a round goes on, and where a job fits best."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.scheduler import PlacedJob, Share
from kernelm_scheduler.amounts import CPU_TOLERANCE, allocation_of
from kernelm_scheduler.index import Index, Matrix
from kernelm_scheduler.queue import Ask
from kernelm_sdk.system import Resources

NOT = float("-inf")  # score of a node that doesn't fit


class Found(NamedTuple):
    """A place for all members of an ask."""

    rows: tuple[tuple[int, int], ...]  # (row of a node, members there)
    type: str  # of the devices
    plugin: str
    score: float


class Score(NamedTuple):
    """The terms of a node's score, each between 0 and 1, and their weighted mean."""

    packing: float
    locality: float
    spread: float
    total: float


class Room:
    """Two accounts: `free` is what is left now; `long` what a job may take that stays beyond the first reservation."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.free: Matrix = index.free.copy()
        self.long: Matrix = self.free  # the same until something is reserved
        self.slots = {plugin: slots.copy() for plugin, slots in index.slots.items()}
        self._few = max(len(index.names) // 32, 8)  # changed rows up to which a vector of scores is put right and not made anew
        self.spread: dict[str, Matrix] = {}  # tenant -> its jobs on each node, for those who were looked at
        self._apart: dict[str, Matrix] = {}  # tenant -> that term of the score
        self._vectors: dict[tuple[object, str, str, bool], tuple[Matrix, int]] = {}
        self._needs: dict[tuple[Ask, str], tuple[Matrix, list[float]]] = {}
        self._log: list[int] = []  # rows in the order in which they changed

    # ---- finding ----

    def find(self, ask: Ask, artifacts: tuple[str, ...] = (), short: bool = False) -> Found | None:
        """The best place for all members of `ask`; None if there is none. `short`: it ends before the first reservation."""
        for type in self.index.options(ask):
            for plugin in ask.plugins:
                if plugin not in self.slots:
                    continue
                found = (self._one(ask, type, plugin, artifacts, short) if ask.members == 1
                         else self.gang(ask, ask.members, type, plugin, self._matrix(short)))  # fmt: skip
                if found:
                    return found
        return None

    def _matrix(self, short: bool) -> Matrix:
        return self.free if short else self.long

    def _one(self, ask: Ask, type: str, plugin: str, artifacts: tuple[str, ...], short: bool) -> Found | None:
        scores = self._scores(ask, type, plugin, short)
        if not len(scores):
            return None
        best = int(scores.argmax())
        total = float(scores[best])
        if total <= NOT:
            return None
        near_by = {i for digest in artifacts for i in self.index.caches.get(digest, ())} if artifacts else ()
        for i in sorted(near_by):
            if scores[i] > NOT and (near := float(scores[i]) + self._locality(i, artifacts)) > total:
                best, total = i, near
        return Found(((best, 1),), type, plugin, total / self._weight())

    def _locality(self, i: int, artifacts: tuple[str, ...]) -> float:
        return self.index.settings.weights.locality * self.locality(i, artifacts)

    def locality(self, i: int, artifacts: tuple[str, ...]) -> float:
        wanted = set(artifacts)
        return sum(self.index.caches.get(digest, {}).get(i, 0.0) for digest in wanted) / len(wanted) if wanted else 0.0

    def _weight(self) -> float:
        weights = self.index.settings.weights
        more = self.index.scoring.weight if self.index.scoring else 0.0
        return (weights.packing + weights.locality + weights.spread + more) or 1.0

    def _scores(self, ask: Ask, type: str, plugin: str, short: bool) -> Matrix:
        """Of every node for one member, without locality."""
        packed = self._packed(ask, type, plugin, short)
        weight = self.index.settings.weights.spread
        if not weight:
            return packed
        if ask.tenant not in self._apart:
            self._apart[ask.tenant] = weight / (1.0 + self._there(ask.tenant))
        return packed + self._apart[ask.tenant]

    def _packed(self, ask: Ask, type: str, plugin: str, short: bool) -> Matrix:
        """As `_scores`, but for the tenant's jobs: the same for all who ask for the same. Cached; put right where rows change."""
        whose = ask.tenant if self.index.scoring else ""
        key = (ask.shape, whose, type, plugin, short and self.long is not self.free)
        vector, at = self._vectors.get(key, (None, 0))
        changed = self._log[at:]
        if vector is None or len(changed) > self._few:
            vector = self._scored(ask, type, plugin, self._matrix(short), np.arange(len(self.index.names)))
        else:
            for row in set(changed):
                vector[row] = self._scored_one(ask, type, plugin, self._matrix(short), row)
        self._vectors[key] = vector, len(self._log)
        return vector

    def _scored(self, ask: Ask, type: str, plugin: str, matrix: Matrix, rows: NDArray[np.intp]) -> Matrix:
        weights, need = self.index.settings.weights, self.index.need(ask, type)
        free = matrix[rows]
        fits = (free + CPU_TOLERANCE >= need).all(axis=1) & self.index.candidates(ask, type)[rows] & (self.slots[plugin][rows] > 0)
        vector = np.full(len(rows), NOT)
        if not fits.any():
            return vector
        scale = self.index.scale[rows]
        unused = ((self.free[rows, :3] - need[:3]) / scale[:, :3]).sum(axis=1) / scale[:, 3]
        good = weights.packing * (1.0 - unused)
        if self.index.scoring:
            good += self.index.scoring(ask.tenant, ask.request, tuple(self.index.names[r] for r in rows), free[:, :3])
        return np.where(fits, good, vector)

    def _scored_one(self, ask: Ask, type: str, plugin: str, matrix: Matrix, row: int) -> float:
        """As `_scored`, in the same steps, for one node: plain numbers are ten times as fast for so few."""
        if self.index.scoring:
            return float(self._scored(ask, type, plugin, matrix, np.array([row]))[0])
        need = self._need(ask, type)[1]
        if self.slots[plugin][row] <= 0 or not self.index.candidates(ask, type)[row]:
            return NOT
        has = matrix[row].tolist()
        for column, wants in enumerate(need):
            if has[column] + CPU_TOLERANCE < wants:
                return NOT
        return self.index.settings.weights.packing * (1.0 - self._unused(row, need))

    def _unused(self, row: int, need: list[float]) -> float:
        """The mean over cores, memory and GPUs of what would be left of the node."""
        cpu, memory, gpus = self.free[row, :3].tolist()
        cpus, memories, all_gpus, dimensions = self.index.plain[row]
        return ((cpu - need[0]) / cpus + (memory - need[1]) / memories + (gpus - need[2]) / all_gpus) / dimensions

    def _need(self, ask: Ask, type: str) -> tuple[Matrix, list[float]]:
        """`Index.need`, and the same in plain numbers."""
        found = self._needs.get((ask, type))
        if found is None:
            need = self.index.need(ask, type)
            found = self._needs[ask, type] = need, need.tolist()
        return found

    def _there(self, tenant: str) -> Matrix:
        """The tenant's jobs on each node."""
        if tenant not in self.spread:
            known = self.index.spread.get(tenant)
            self.spread[tenant] = np.zeros(len(self.index.names)) if known is None else known.copy()
        return self.spread[tenant]

    def score(self, ask: Ask, found: Found, artifacts: tuple[str, ...]) -> Score:
        """The terms behind the score of the first node of a place, before it is taken."""
        i = found.rows[0][0]
        unused = self._unused(i, self._need(ask, found.type)[1])
        spread = 1.0 / (1.0 + float(self._there(ask.tenant)[i]))
        return Score(1.0 - unused, self.locality(i, artifacts), spread, found.score)

    # ---- gangs ----

    def crew(self, ask: Ask) -> int:
        """The most members that the instances of one of its plugins could take, were none of them at work."""
        able = np.zeros(len(self.index.names), dtype=bool)
        for type in self.index.options(ask):
            able |= self.index.candidates(ask, type)
        here = [plugin for plugin in ask.plugins if plugin in self.slots]
        most = max((int(self.slots[plugin][able].clip(0.0).sum()) for plugin in here), default=0)
        if most >= ask.members:
            return most
        work = self._at_work
        return max((int((self.slots[plugin].clip(0.0) + work.get(plugin, 0.0))[able].sum()) for plugin in here), default=0)

    @cached_property
    def _at_work(self) -> dict[str, Matrix]:
        """Members that each plugin has at work on each node."""
        found: dict[str, Matrix] = {}
        for job in self.index.placed.values():
            counts = found.setdefault(job.plugins[0] if job.plugins else "", np.zeros(len(self.index.names)))
            for share in allocation_of(job):
                if (row := self.index.row.get(share.node)) is not None:
                    counts[row] += share.members
        return found

    def fitting(self, ask: Ask, type: str, plugin: str, matrix: Matrix, slots: bool = True) -> NDArray[np.int64]:
        """How many members fit on each node."""
        need = self.index.need(ask, type)
        used = need > 0
        counts = np.full(len(self.index.names), 1 << 20)
        if used.any():
            counts = np.minimum(counts, np.floor((matrix[:, used] + CPU_TOLERANCE) / need[used]).min(axis=1))
        if slots and plugin:
            counts = np.minimum(counts, self.slots[plugin])
        return np.where(self.index.candidates(ask, type) & (counts > 0), counts, 0).astype(np.int64)

    def gang(self, ask: Ask, members: int, type: str, plugin: str, matrix: Matrix, slots: bool = True) -> Found | None:
        """A place for `members` members together or not at all: on one node, else behind one fast link, else anywhere, on as
        few nodes as possible."""
        counts = self.fitting(ask, type, plugin, matrix, slots)
        alone = np.flatnonzero(counts >= members)
        if len(alone):
            row = int(alone[np.argmin(counts[alone])])  # the fullest that will do
            return Found(((row, members),), type, plugin, 1.0)
        if ask.within == "node":
            return None
        groups = [np.array(rows) for _, rows in sorted(self.index.links.items()) if counts[rows].sum() >= members]
        if groups:
            rows = min(groups, key=lambda g: (int(counts[g].sum()), int(g[0])))
        elif ask.within == "link" or counts.sum() < members:
            return None
        else:
            rows = np.arange(len(counts))
        chosen: list[tuple[int, int]] = []
        left = members
        for row in rows[np.lexsort((rows, -counts[rows]))]:
            if left <= 0:
                break
            some = min(int(counts[row]), left)
            chosen.append((int(row), some))
            left -= some
        return Found(tuple(chosen), type, plugin, 1.0 / len(chosen))

    # ---- taking and giving ----

    def take(self, ask: Ask, found: Found, short: bool = False) -> tuple[Share, ...]:
        """The allocation, which is now gone from the room."""
        there, apart = self._there(ask.tenant), self._apart.get(ask.tenant)
        for row, members in found.rows:
            need = self._need(ask, found.type)[0]
            need = need if members == 1 else need * members
            self.free[row] -= need
            if self.long is not self.free:
                self.long[row] = np.minimum(self.long[row], self.free[row]) if short else self.long[row] - need
            self.slots[found.plugin][row] -= members
            there[row] += 1.0
            if apart is not None:
                apart[row] = self.index.settings.weights.spread / (1.0 + there[row])
            self._log.append(row)
        return tuple(Share(self.index.names[row], members, found.type if ask.request.gpus > 0 else "")
                     for row, members in found.rows)  # fmt: skip

    def give(self, request: Resources, shares: tuple[Share, ...], plugin: str = "", sign: float = 1.0) -> None:
        """Put back what an allocation holds (take it, with sign -1)."""
        for row, amount, members in self.index.amounts(request, shares):
            self.free[row] += sign * amount
            if self.long is not self.free:
                self.long[row] += sign * amount
            if plugin in self.slots and self.slots[plugin][row] >= 0:
                self.slots[plugin][row] += sign * members
            self._log.append(row)

    def keep(self, request: Resources, shares: tuple[Share, ...]) -> None:
        """Take as much as is free now of an allocation that can't be taken as a whole yet."""
        for row, amount, _ in self.index.amounts(request, shares):
            for matrix in [self.free] if self.long is self.free else [self.free, self.long]:
                matrix[row] -= np.clip(matrix[row], 0.0, amount)
            self._log.append(row)

    def release(self, job: PlacedJob, sign: float = 1.0) -> None:
        self.give(job.request, allocation_of(job), job.plugins[0] if job.plugins else "", sign)

    def touch(self) -> None:
        """Forget cached scores: reservations have changed the room."""
        self._vectors.clear()
