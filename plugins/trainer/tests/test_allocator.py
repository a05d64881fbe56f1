import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import psutil
import pytest
import torch

from kernelm_trainer.allocator import has_main_arena, in_main_arena, memory_kept

STEPS = 20
PAGES = STEPS * 64 * 2**20 // resource.getpagesize()  # that `faults` writes to


def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(STEPS):
        torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measure() -> tuple[int, int, float]:
    """Page faults without and with memory kept, MB that are not given back."""
    faults()
    without, before = faults(), psutil.Process().memory_info().rss
    with memory_kept():
        faults()
        kept = faults()
    return without, kept, (psutil.Process().memory_info().rss - before) / 2**20


def measure_beside_other_arenas() -> tuple[int, int, float]:
    """The same in a thread of a process whose threads have arenas already."""
    with ThreadPoolExecutor(3) as busy:
        over = Event()
        for _ in range(3):
            busy.submit(lambda: (bytearray(100_000), over.wait()))
        try:
            return in_main_arena(measure)
        finally:
            over.set()


@pytest.mark.parametrize("where", ["measure", "measure_beside_other_arenas"])
def test_freed_memory_is_used_again_and_given_back_at_the_end(where: str) -> None:
    """In a process of its own, whose memory nothing else moves."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_allocator as t; print(*t.{where}())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    without, kept, grown = map(float, done.stdout.split())
    assert without > PAGES / 2
    assert kept < without / 10
    assert grown < 32  # MB


def test_a_thread_with_the_main_arena_is_found_again_and_again() -> None:
    assert has_main_arena()
    for _ in range(5):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(in_main_arena, has_main_arena).result()


def test_what_the_function_raises_comes_out() -> None:
    with pytest.raises(ZeroDivisionError):
        in_main_arena(lambda: 1 / 0)
