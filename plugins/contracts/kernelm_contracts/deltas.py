"""Deltas of the scheduler's state as pure functions: what changed between two, and one with what changed."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from kernelm_contracts.scheduler import ClusterDelta, ClusterState

T = TypeVar("T")
PART_BYTES = 700_000  # of a delta; a message holds 1 MB


def applied(state: ClusterState | None, delta: ClusterDelta) -> ClusterState:
    """`state` after `delta`, which must be based on it (None for base 0). New entries come behind those that are there."""
    state = state or ClusterState(0, 0.0, (), ())
    jobs = {*delta.gone, *(j.id for j in delta.pending), *(j.id for j in delta.placed)}
    pending = {j.id: j for j in delta.pending}
    placed = {j.id: j for j in delta.placed}
    return ClusterState(
        delta.version, delta.now,
        _merged(state.nodes, {n.name: n for n in delta.nodes}, set(delta.gone_nodes), "name"),
        _merged(state.pending, pending, jobs - pending.keys(), "id"), _merged(state.placed, placed, jobs - placed.keys(), "id"),
        state.quotas if delta.quotas is None else delta.quotas, state.tenants if delta.tenants is None else delta.tenants,
        _merged(state.models, {m.name: m for m in delta.models}, set(delta.gone_models), "name"),
        state.actions if delta.actions is None else delta.actions, delta.source,
    )  # fmt: skip


def _merged(old: tuple[Any, ...], new: dict[str, Any], gone: set[str], key: str) -> tuple[Any, ...]:
    if not new and not gone:
        return old
    kept = [new.pop(name, entry) for entry in old if (name := getattr(entry, key)) not in gone]
    return (*kept, *new.values())


def changes(old: ClusterState | None, new: ClusterState) -> ClusterDelta:
    """The delta that leads from `old` (None for nothing) to `new`, but for the order of entries."""
    base = old or ClusterState(0, 0.0, (), ())
    before = {j.id for j in base.pending} | {j.id for j in base.placed}
    after = {j.id for j in new.pending} | {j.id for j in new.placed}
    return ClusterDelta(
        new.source, base.version, new.version, new.now, _changed(base.nodes, new.nodes, "name"),
        _changed(base.pending, new.pending, "id"), _changed(base.placed, new.placed, "id"),
        _changed(base.models, new.models, "name"),
        None if old and old.quotas == new.quotas else new.quotas, None if old and old.tenants == new.tenants else new.tenants,
        None if old and old.actions == new.actions else new.actions, tuple(sorted(before - after)),
        tuple(sorted({n.name for n in base.nodes} - {n.name for n in new.nodes})),
        tuple(sorted({m.name for m in base.models} - {m.name for m in new.models})),
    )  # fmt: skip


def _changed(old: Iterable[T], new: Iterable[T], key: str) -> tuple[T, ...]:
    before = {getattr(entry, key): entry for entry in old}
    return tuple(entry for entry in new
                 if (was := before.get(getattr(entry, key))) is not entry and was != entry)  # fmt: skip


def parts(delta: ClusterDelta, size: int = PART_BYTES) -> Iterator[ClusterDelta]:
    """`delta` as several that are applied one after the other, each small enough for a message; all but the last have `more`.
    They are based on each other by their `version`: 0 for the first one of a snapshot, then the negative number of the part."""
    whole = len(msgspec.json.encode(delta))
    if whole <= size:
        yield delta
        return
    fields = ("nodes", "placed", "pending")  # a job that moved is not in both
    entries = [(field, entry) for field in fields for entry in getattr(delta, field)]
    share = max(1, len(entries) * size // (whole * 2))  # entries differ in size: half of what would fit on average
    base, number, rest = delta.base, 0, iter(entries)
    bare = replace(delta, nodes=(), placed=(), pending=())
    while some := list(islice(rest, share)):
        number += 1
        last = number * share >= len(entries)
        version = delta.version if last else -number
        head = bare if last else ClusterDelta(delta.source, base, version, delta.now)
        yield replace(head, base=base, version=version, more=not last,
                      **{field: tuple(e for f, e in some if f == field) for field in fields})  # fmt: skip
        base = version
