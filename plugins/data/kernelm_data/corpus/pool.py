"""Shards on all cores. A shard whose process dies is tried again by itself; the document that its parser dies of is left out."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from kernelm_sdk.errors import PluginFault

T = TypeVar("T")
TRIES = 10  # documents of one shard that may kill a process
LOOK_S = 1.0  # seconds after which the caller is asked whether the work is still wanted


def _end_with_parent() -> None:
    """Worker processes wait for work for ever; when their parent is killed they have to end by themselves."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import pyarrow

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)


def _marked(folder: Path) -> str:
    """The document whose parser ran last."""
    try:
        data = (folder / "parsing").read_bytes()
    except FileNotFoundError:
        return ""
    return data[4 : 4 + int.from_bytes(data[:4], "little")].decode("utf-8", "replace") if len(data) > 4 else ""


def run(task: Callable[..., T], path: str, shards: Sequence[tuple[Any, ...]], workers: int, folder: Callable[[int], Path],
        wanted: Callable[[], None]) -> Iterator[tuple[int, T]]:  # fmt: skip
    """`task(path, *shard)` for every shard, whose first value is its number; number and result of each as it ends. `workers`:
    processes, 0 for none but this one. `wanted` is called often, and may raise to stop."""
    if not workers:
        for shard in shards:
            wanted()
            yield shard[0], task(path, *shard)
        return
    left = {shard[0]: shard for shard in shards}
    while left:
        try:
            for number, result in _run(task, path, list(left.values()), workers, wanted):
                del left[number]
                yield number, result
        except BrokenProcessPool:
            suspects = [shard for shard in left.values() if _marked(folder(shard[0]))] or list(left.values())[:workers]
            for shard in suspects:
                yield shard[0], _alone(task, path, shard, folder(shard[0]), wanted)
                del left[shard[0]]


def _run(task: Callable[..., T], path: str, shards: Sequence[tuple[Any, ...]], workers: int,
         wanted: Callable[[], None]) -> Iterator[tuple[int, T]]:  # fmt: skip
    pool = _pool(min(workers, len(shards)))
    try:
        waiting: dict[Future[T], int] = {pool.submit(task, path, *shard): shard[0] for shard in shards}
        while waiting:
            wanted()
            done, _ = wait(waiting, LOOK_S, FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # a cancelled job must not wait for the shards that are under way
            process.terminate()


def _alone(task: Callable[..., T], path: str, shard: tuple[Any, ...], folder: Path, wanted: Callable[[], None]) -> T:
    poison: list[str] = []
    for _ in range(TRIES):
        try:
            extra = (tuple(poison),) if poison else ()
            return next(result for _, result in _run(task, path, [(*shard, *extra)], 1, wanted))
        except BrokenProcessPool:
            if (id := _marked(folder)) and id not in poison:
                poison.append(id)
    raise PluginFault(
        "worker_died",
        f"the process of shard {shard[0]} died {TRIES} times, lately at document {poison[-1:] or 'unknown'}",
        "give the job more memory, or smaller shards by store.shard_mb; then look at that document",
    )
