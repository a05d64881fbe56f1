"""Shards on all cores of this machine. A shard whose process dies is tried again by itself; the document that its parser dies of is
left out."""

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kernelm_sdk.errors import PluginFault

T = TypeVar("T")
Task = Callable[..., T]
Shard = tuple[Any, ...]
TRIES = 10  # documents of one shard that may kill a process
SELDOM = (100_000, 50, 100)  # thresholds of the collector of reference cycles
LOOK_S = 1.0  # seconds after which the caller is asked whether the work is still wanted


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let the collector of reference cycles leave alone what there is, and look seldom: documents make no cycles, and it would go
    over some 400,000 objects of imported modules again and again (0.5 s in 200 MB)."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _end_with_parent() -> None:
    """Worker processes wait for work for ever; when their parent is killed they have to end by themselves."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    gc.set_threshold(*SELDOM)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import pyarrow

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)


class Engine(Protocol):
    """What runs shards somewhere."""

    def run(self, task: Task[T], path: str, shards: Sequence[Shard], folder: Callable[[int], Path],
            wanted: Callable[[], None]) -> Iterator[tuple[int, T]]:  # fmt: skip
        """`task(path, *shard)` for every shard, whose first value is its number; number and result of each as it ends. `folder`: of
        the number of a shard. `wanted` is called often, and may raise to stop."""
        ...

    def stop(self) -> None:
        """End what runs, at once."""
        ...


class Here:
    """In this process, one after the other."""

    def run(self, task: Task[T], path: str, shards: Sequence[Shard], folder: Callable[[int], Path],
            wanted: Callable[[], None]) -> Iterator[tuple[int, T]]:  # fmt: skip
        for shard in shards:
            wanted()
            yield shard[0], task(path, *shard)

    def stop(self) -> None:
        pass


class Crew:
    """Worker processes, forked when they are first needed from a server that has imported and compiled everything once, and kept
    for all passes."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        get_ready()

    def run(self, task: Task[T], path: str, shards: Sequence[Shard], folder: Callable[[int], Path],
            wanted: Callable[[], None]) -> Iterator[tuple[int, T]]:  # fmt: skip
        left = {shard[0]: shard for shard in shards}
        while left:
            self._pool = self._pool or _pool(self.workers)
            try:
                for number, result in _run(task, path, list(left.values()), self._pool, wanted):
                    del left[number]
                    yield number, result
            except BrokenProcessPool:
                self.stop()
                suspects = [shard for shard in left.values() if marked(folder(shard[0]))] or list(left.values())[: self.workers]
                for shard in suspects:
                    yield shard[0], _alone(task, path, shard, folder(shard[0]), wanted)
                    del left[shard[0]]

    def stop(self) -> None:
        if self._pool is not None:
            _end(self._pool)
            self._pool = None


def get_ready() -> None:
    """Start the server, which takes as long to import and load everything as the caller does, beside the caller."""
    forkserver.set_forkserver_preload(["kernelm_data.corpus.warm"])
    forkserver.ensure_running()


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _end_with_parent)


def _end(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()


def marked(folder: Path) -> str:
    """The document whose parser ran last."""
    try:
        data = (folder / "parsing").read_bytes()
    except FileNotFoundError:
        return ""
    return data[4 : 4 + int.from_bytes(data[:4], "little")].decode("utf-8", "replace") if len(data) > 4 else ""


def _run(task: Task[T], path: str, shards: Sequence[Shard], pool: ProcessPoolExecutor,
         wanted: Callable[[], None]) -> Iterator[tuple[int, T]]:  # fmt: skip
    waiting: dict[Future[T], int] = {pool.submit(task, path, *shard): shard[0] for shard in shards}
    while waiting:
        wanted()
        done, _ = wait(waiting, LOOK_S, FIRST_COMPLETED)
        for future in done:
            yield waiting.pop(future), future.result()


def _alone(task: Task[T], path: str, shard: Shard, folder: Path, wanted: Callable[[], None]) -> T:
    poison: list[str] = []
    for _ in range(TRIES):
        pool = _pool(1)
        try:
            extra = (tuple(poison),) if poison else ()
            return next(result for _, result in _run(task, path, [(*shard, *extra)], pool, wanted))
        except BrokenProcessPool:
            if (id := marked(folder)) and id not in poison:
                poison.append(id)
        finally:
            _end(pool)
    raise died(shard[0], poison)


def died(number: int, poison: Sequence[str]) -> PluginFault:
    """The fault of a shard whose process dies again and again."""
    return PluginFault(
        "worker_died",
        f"the process of shard {number} died {TRIES} times, lately at document {poison[-1:] or 'unknown'}",
        "give the job more memory, or smaller shards by store.shard_mb; then look at that document",
    )
