"""Keeps freed memory in the process while it trains.

By default glibc gives large blocks back to the system as they are freed, and each step gets them anew, zeroed page by page: for
30 M parameters at 8 x 256 tokens 100,000 page faults a step, 8% of its processor time (see mallopt(3)). It can be told to keep
them, but only in its main arena, which the first thread has: what other threads have consists of heaps of at most 64 MB, which are
unmapped as they become empty, and larger blocks are mapped one by one (malloc/arena.c and malloc/malloc.c of glibc 2.36).
"""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

T = TypeVar("T")
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8  # malloc.h
MB = 2**20
KEEP = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 * MB))
DEFAULTS = ((MMAP_MAX, 65536), (TRIM_THRESHOLD, 128 * 1024), (TOP_PAD, 0))
PROBE = 32 * 1024  # bytes: too many for a thread's cache of freed blocks, too few to be mapped
CANDIDATES = 64  # threads; an instance has a handful of arenas

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes, libc.sbrk.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,), (ctypes.c_ssize_t,)
if hasattr(libc, "mallopt"):
    libc.mallopt(ARENA_MAX, 1)  # as early as can be: after the eighth arena glibc would not listen to it any more


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, what this thread frees is used again, if it has the main arena; at the end it goes back to the system. Without glibc
    nothing happens."""
    if not hasattr(libc, "mallopt"):
        yield
        return
    for parameter, value in KEEP:
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in DEFAULTS:
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def in_main_arena(function: Callable[[], T]) -> T:
    """What `function` returns or raises, in a thread that has the main arena; in any thread if none comes to have it.

    As no more arenas may be made, new threads take turns among those that there are. A thread that got another one waits until the
    end: what it left would be the next one's.
    """
    if not hasattr(libc, "mallopt"):
        return function()
    over = Event()

    def attempt(fits: "Future[bool]", last: bool) -> T | None:
        fits.set_result(last or has_main_arena())
        if fits.result():
            return function()
        over.wait()
        return None

    with ThreadPoolExecutor(CANDIDATES, "training") as threads:
        try:
            for left in reversed(range(CANDIDATES)):
                fits: Future[bool] = Future()
                attempted = threads.submit(attempt, fits, not left)
                if fits.result():
                    break
        finally:
            over.set()
        return attempted.result()  # type: ignore[return-value]


def has_main_arena() -> bool:
    """Whether this thread's blocks come from below the program break, where only the main arena's lie (brk(2))."""
    block = libc.malloc(PROBE)
    libc.free(block)
    return bool(block < libc.sbrk(0))
