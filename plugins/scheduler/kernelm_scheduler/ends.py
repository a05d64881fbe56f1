"""When what becomes free on which node: the known ends of placed jobs, as arrays that are kept from round to round."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernelm_scheduler.amounts import CPU_TOLERANCE

Matrix = NDArray[np.float64]
Part = tuple[float, Matrix]  # end in Unix seconds, amounts by column


class Timeline(NamedTuple):
    """Ends in order of node and time; ties in an order that does not hang on that of the jobs."""

    rows: NDArray[np.intp]
    times: Matrix
    amounts: Matrix  # end x column

    def replaced(self, parts: Mapping[int, Iterable[Part]]) -> "Timeline":
        """With `parts` (row -> ends) for all that was known of those rows."""
        kept = ~np.isin(self.rows, list(parts)) if len(self.rows) else np.zeros(0, dtype=bool)
        new = [(row, *part) for row, some in parts.items() for part in sorted(some, key=lambda p: (p[0], *p[1].tolist()))]
        if not new:
            return Timeline(self.rows[kept], self.times[kept], self.amounts[kept])
        rows = np.concatenate([self.rows[kept], np.array([row for row, _, _ in new], dtype=np.intp)])
        order = np.argsort(rows, kind="stable")
        times = np.concatenate([self.times[kept], [time for _, time, _ in new]])
        amounts = np.concatenate([self.amounts[kept], [amount for _, _, amount in new]])
        return Timeline(rows[order], times[order], amounts[order])


class Frees:
    """A timeline as questions are put to it: where do how many members fit after which end."""

    def __init__(self, timeline: Timeline, now: float, nodes: int) -> None:
        self._rows, self._amounts, self._nodes = timeline.rows, timeline.amounts, nodes
        self._times = np.maximum(timeline.times, now)
        self._order = np.argsort(self._times, kind="stable")
        self._first = np.ones(len(self._rows), dtype=bool)  # of its node
        self._first[1:] = self._rows[1:] != self._rows[:-1]
        sums = np.cumsum(self._amounts, axis=0)
        before = (sums - self._amounts)[self._first]
        self._sums = sums - np.repeat(before, np.diff(np.flatnonzero(np.append(self._first, True))), axis=0)  # on its node, so far

    def time(self, end: int) -> float:
        return float(self._times[self._order[end]])

    def freed(self, end: int) -> Matrix:
        """What is free of each node after that end, beside what is free now."""
        past = np.zeros(len(self._rows), dtype=bool)
        past[self._order[: end + 1]] = True
        rows, amounts = self._rows[past], self._amounts[past]
        return np.stack([np.bincount(rows, amounts[:, n], self._nodes) for n in range(amounts.shape[1])], axis=1)

    def enough(self, free: Matrix, need: Matrix, able: NDArray[np.bool_], members: int, within: str,
               links: Iterable[list[int]]) -> int | None:  # fmt: skip
        """The first end, in order of time, after which `members` of `need` fit on `able` nodes; None for never. `within`: "node"
        for one of them, "link" for one or those behind one of `links` (rows)."""
        used = need > 0
        if not used.any() or not len(self._rows):
            return None

        def fit(room: Matrix, rows: NDArray[np.bool_]) -> Matrix:
            return np.where(rows, np.floor((room[:, used] + CPU_TOLERANCE) / need[used]).min(axis=1).clip(0.0), 0.0)

        at_first, after = fit(free, able), fit(free[self._rows] + self._sums, able[self._rows])
        before = np.where(self._first, at_first[self._rows], np.roll(after, 1))
        more, rows = (after - before)[self._order], self._rows[self._order]
        if not within:
            return _first(at_first.sum() + np.cumsum(more) >= members)
        found = [_first(after[self._order] >= members)]
        for link in links if within == "link" else ():
            mine = np.zeros(self._nodes, dtype=bool)
            mine[link] = True
            found.append(_first(at_first[mine].sum() + np.cumsum(np.where(mine[rows], more, 0.0)) >= members))
        return min((end for end in found if end is not None), default=None)


def _first(true: NDArray[np.bool_]) -> int | None:
    return int(true.argmax()) if true.any() else None


class Ends:
    """Of all placed jobs whose end is known."""

    def __init__(self, columns: int) -> None:
        self._timeline = Timeline(np.zeros(0, dtype=np.intp), np.zeros(0), np.zeros((0, columns)))
        self._on: dict[int, dict[str, Part]] = {}  # row -> job -> what it frees there
        self._of: dict[str, list[int]] = {}  # job -> rows
        self._dirty: set[int] = set()

    def __contains__(self, id: str) -> bool:
        return id in self._of

    def add(self, id: str, time: float, amounts: Iterable[tuple[int, Matrix]]) -> None:
        """A job that frees `amounts` (row, by column) at `time`."""
        for row, amount in amounts:
            known = self._on.setdefault(row, {})
            known[id] = (time, amount + known[id][1]) if id in known else (time, amount)
            self._of.setdefault(id, []).append(row)
            self._dirty.add(row)

    def drop(self, id: str) -> None:
        for row in self._of.pop(id, ()):
            self._on[row].pop(id, None)
            self._dirty.add(row)

    def rows(self, id: str) -> list[int]:
        return self._of.get(id, [])

    def on(self, row: int, without: Iterable[str] = ()) -> list[Part]:
        """The ends on one node, but for those of some jobs."""
        return [part for id, part in self._on.get(row, {}).items() if id not in without]

    def timeline(self) -> Timeline:
        if self._dirty:
            self._timeline = self._timeline.replaced({row: self.on(row) for row in self._dirty})
            self._dirty = set()
        return self._timeline
