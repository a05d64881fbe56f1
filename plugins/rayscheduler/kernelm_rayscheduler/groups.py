"""The placement groups in Ray. Everything here blocks: call it from a thread."""

import logging
import socket
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

import ray
from ray.util.placement_group import get_placement_group, placement_group, placement_group_table, remove_placement_group

from kernelm_rayscheduler.mapping import LEAST, Group, Wanted
from kernelm_rayscheduler.settings import Settings
from kernelm_sdk.errors import PluginFault

PREFIX = "kernelm/"  # of the names of our groups
AT_IT = ("QUEUED", "SCHEDULING_STARTED", "FAILED_TO_COMMIT_RESOURCES")  # Ray's scheduling states in which it has said nothing yet
LOOK_S = 0.005
CONNECT_S = 5.0
log = logging.getLogger("kernelm.rayscheduler")


class Groups:
    """Those of one namespace. They are detached: a scheduler that is restarted or replaced finds them again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def connect(self) -> None:
        """PluginFault "no_ray" where there is no cluster at the address."""
        address = self._settings.address
        try:
            if address != "auto":  # Ray itself tries for minutes where nobody listens
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), CONNECT_S).close()
            ray.init(address, namespace=self._settings.namespace, log_to_driver=False, ignore_reinit_error=True,
                     logging_level=logging.ERROR)  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise PluginFault("no_ray", f"no Ray cluster at {address!r}: {error}",
                              'start Ray on the nodes, or correct the setting "address"') from error  # fmt: skip

    def close(self) -> None:
        ray.shutdown()

    def table(self) -> dict[str, Group]:
        """Ray's word on each group, by the job's id."""
        names = {node["NodeID"]: node["Labels"].get(self._settings.label, "") for node in ray.nodes() if node["Alive"]}
        found = {}
        for entry in placement_group_table().values():
            if entry["name"].startswith(PREFIX) and entry["state"] != "REMOVED":
                found[entry["name"].removeprefix(PREFIX)] = self._group(entry, names)
        return found

    @staticmethod
    def _group(entry: dict[str, Any], names: dict[str, str]) -> Group:
        if entry["state"] == "CREATED":
            bundles = entry["bundles_to_node_id"]
            return Group(tuple(names.get(bundles[number], "") for number in sorted(bundles)))
        said = entry["stats"]["scheduling_state"]
        return Group((), said != "INFEASIBLE", said not in AT_IT)

    def create(self, wanted: Wanted) -> None:
        selectors = [{self._settings.label: f"in({','.join(nodes)})"} for nodes in wanted.nodes]
        strategy = "STRICT_PACK" if wanted.together else "PACK"
        placement_group([wanted.bundle() for _ in wanted.nodes], strategy, PREFIX + wanted.id, "detached",
                        bundle_label_selector=selectors)  # fmt: skip

    def remove(self, ids: Collection[str]) -> None:
        """Give groups up, and wait until Ray's account has what they held, at most `settle_s`: before that it finds no room."""
        if not ids:
            return
        known = {entry["name"]: entry for entry in placement_group_table().values() if entry["state"] == "CREATED"}
        entries = [known[PREFIX + id] for id in ids if PREFIX + id in known]
        freed = sum((Counter(bundle) for entry in entries for bundle in entry["bundles"].values()), Counter[str]())
        before = Counter(ray.available_resources())
        for id in ids:
            remove_placement_group(get_placement_group(PREFIX + id))
        until = time.monotonic() + self._settings.settle_s
        while time.monotonic() < until:
            now = ray.available_resources()
            if all(now.get(name, 0.0) > before[name] + amount - LEAST["CPU"] / 2 for name, amount in freed.items()):
                return
            time.sleep(LOOK_S)
        log.warning("Ray has not yet taken back what %d groups held: who waits for it starts a round later", len(entries))

    def settled(self, ids: Collection[str]) -> dict[str, Group]:
        """As `table`, when Ray has decided on all of `ids`, or after `settle_s`."""
        until = time.monotonic() + self._settings.settle_s
        while True:
            found = self.table()
            if all(found[id].decided for id in ids if id in found) or time.monotonic() > until:
                return found
            time.sleep(LOOK_S)
