"""Shards on the nodes of a Ray cluster, which see the inputs and the work folder under the same paths as this machine. The shards,
and so the bytes of the dataset, are those of the engine on this machine."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kernelm_data.corpus.pool import LOOK_S, TRIES, Shard, T, Task, died, marked
from kernelm_sdk.errors import ClientFault

_lock = threading.Lock()
_users = 0  # of the connection, of which a process has one


def _connect(address: str) -> Any:
    """Ray, connected. ClientFault if it is not installed or not there."""
    global _users
    try:
        import ray
    except ImportError:
        remedy = "install kernelm-data[ray] where this plugin runs, and on Ray's nodes"
        raise ClientFault("no_ray", 'engine "ray": Ray is not installed', remedy) from None
    with _lock:
        if not _users:
            try:
                ray.init(address, logging_level="error", log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ClientFault("no_ray", f"ray_address: {address}: {error}", "start Ray there, or correct the setting") from None
        _users += 1
    return ray


def _disconnect(ray: Any) -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            ray.shutdown()


def _task(task: Task[T], path: str, shard: Shard) -> tuple[str, T]:
    """On a node: its address, and the result."""
    import pyarrow
    import ray

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pyarrow.set_cpu_count(1)
    return ray.util.get_node_ip_address(), task(path, *shard)


def _absent(paths: Sequence[str]) -> list[str]:
    """On a node: the paths that it does not see."""
    return [path for path in paths if not Path(path).exists()]


class Cluster:
    """An engine for `pipeline.prepare`."""

    def __init__(self, address: str) -> None:
        self._ray = _connect(address)
        self._running: dict[Any, tuple[Shard, list[str]]] = {}  # task -> shard, and what killed a process of it before
        self.ran: Counter[str] = Counter()  # address of a node -> shards

    def check(self, paths: Sequence[Path]) -> None:
        """ClientFault `not_shared` if a node does not see one of the paths."""
        ray = self._ray
        for node in (node for node in ray.nodes() if node["Alive"]):
            here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = ray.remote(_absent).options(num_cpus=0, scheduling_strategy=here)
            if absent := ray.get(look.remote([str(path) for path in paths])):
                raise ClientFault(
                    "not_shared",
                    f'engine "ray": node {node["NodeManagerAddress"]} does not see {", ".join(absent)}',
                    "put the artifact store and the setting shared_folder on a file system that all nodes mount at the same place",
                )

    def run(self, task: Task[T], path: str, shards: Sequence[Shard], folder: Callable[[int], Path],
            wanted: Callable[[], None]) -> Iterator[tuple[int, T]]:  # fmt: skip
        ray = self._ray
        from ray.exceptions import RayError, RayTaskError

        # what a dying process leaves is looked at here before its shard is tried again
        remote = ray.remote(_task).options(num_cpus=1, max_retries=0)
        tries: Counter[int] = Counter()
        for shard in shards:
            self._running[remote.remote(task, path, shard)] = shard, []
        while self._running:
            wanted()
            done, _ = ray.wait(list(self._running), timeout=LOOK_S)
            for reference in done:
                shard, poison = self._running.pop(reference)
                try:
                    node, result = ray.get(reference)
                except RayTaskError as error:  # raised by the task
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                except RayError as error:
                    tries[shard[0]] += 1
                    if (id := marked(folder(shard[0]))) and id not in poison:
                        poison = [*poison, id]
                    if tries[shard[0]] == TRIES:
                        raise died(shard[0], poison) from error
                    again = (*shard, tuple(poison)) if poison else shard
                    self._running[remote.remote(task, path, again)] = shard, poison
                    continue
                self.ran[node] += 1
                yield shard[0], result

    def stop(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running = {}
        _disconnect(self._ray)
