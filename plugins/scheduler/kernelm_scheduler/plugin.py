"""`scheduler/1` on the bus; every decision is made in `policy.py`."""

import gc
from typing import Any

from kernelm_contracts.scheduler import ClusterDelta, ClusterState, Decisions, Scheduler
from kernelm_scheduler import policy
from kernelm_scheduler.hooks import installed
from kernelm_scheduler.index import Index
from kernelm_scheduler.settings import Settings
from kernelm_scheduler.steady import steady
from kernelm_sdk.errors import ClientFault
from kernelm_sdk.plugin import Context, Plugin


class SchedulerPlugin(Plugin, Scheduler):
    """Any number of instances may answer, and each gives the same decisions: what is kept between calls is a cache of what the
    caller said, by its name and version."""

    Settings = Settings

    def __init__(self, context: Context, settings: Settings) -> None:
        super().__init__(context, settings)
        self._scoring = installed(settings.weights.hooks)
        self._kept: dict[str, Index] = {}  # source -> its state
        self._frozen: set[str] = set()  # sources whose first snapshot is out of the collector's sight

    async def decide(self, request: ClusterState, call: Any) -> Decisions:
        index = Index.of(request, self.settings)
        index.scoring = self._scoring
        return policy.decided(index)

    def steady(self, request: ClusterState) -> float:
        """For simulations: until when it decides nothing, if nothing happens."""
        return steady(request, self.settings)

    async def update(self, request: ClusterDelta, call: Any) -> Decisions:
        if request.base == 0:
            self._kept[request.source] = Index(self.settings)
            self._kept[request.source].scoring = self._scoring
        index = self._kept.get(request.source)
        if index is None or index.version != request.base:
            known = f"version {index.version}" if index else "nothing"
            raise ClientFault("need_snapshot", f"of {request.source!r} this instance knows {known}, not version {request.base}",
                              "send a snapshot: a delta with base 0")  # fmt: skip
        index.apply(request)
        if request.more:
            return Decisions(index.version, ())
        answer = policy.news(index)
        if index.source not in self._frozen:
            self._frozen.add(index.source)
            gc.freeze()  # the snapshot lives on: a full collection would look through all of it, for longer than a round
        return answer
