"""The compiled kernels, taken from Numba's cache in one go, and without what Numba loads beside them but they never use."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numba.core import caching, entrypoints
from numba.core.runtime import rtsys
from numba.np import linalg

from kernelm_contracts.data import Clean, Filter
from kernelm_data.corpus import kernels
from kernelm_data.corpus.cleaning import as_steps, cleaner
from kernelm_data.corpus.quality import RULES, Measured, rules
from kernelm_data.corpus.sketches import Sketcher, band_keys, gram_table, shape, shares_any


def _from_cache(cache: Any, types: Any, context: Any) -> Any:
    """`Cache.load_overload` without what only compiling needs: the types and implementations of all that Numba knows. The compiler
    asks for them itself, where there is nothing in the cache."""
    rtsys.initialize(context)  # memory that compiled code may ask for
    with cache._guard_against_spurious_io_errors():
        return cache._load_overload(types, context)


@contextmanager
def numba_alone() -> Iterator[None]:
    """Within, Numba loads compiled functions and nothing else: not what it knows of other functions (nor cffi and its parser of C),
    not SciPy, not the extensions of installed packages (Awkward, which comes with Gigatoken). Of 0.85 s of processor time 0.08 are
    left. Who compiles functions of his own in this process has all of it afterwards."""

    def without() -> None:
        raise ImportError

    load, caching.Cache.load_overload = caching.Cache.load_overload, _from_cache
    blas, linalg.ensure_blas = linalg.ensure_blas, without  # asked for when arraymath is imported, for an inner product
    before, entrypoints._already_initialized = entrypoints._already_initialized, True
    try:
        yield
    finally:
        caching.Cache.load_overload = load
        linalg.ensure_blas = blas
        entrypoints._already_initialized = before


@lru_cache(1)
def load_kernels() -> None:
    """Call every compiled function once."""
    with numba_alone():
        text = "A line of words, \u00e4\u00e4 and more.\n" * 20
        clean, _ = cleaner(as_steps(Clean()))(text.encode())
        array, sketcher, signatures = np.frombuffer(clean, np.uint8), Sketcher(128), np.empty((1, 128), np.uint32)
        sketcher.signature(sketcher.grams(array), signatures[0])
        signatures.flags.writeable = False  # as in a file that is mapped into memory
        table = gram_table(sketcher.grams(array))
        table.flags.writeable = False
        shares_any(sketcher.grams(array), table)
        shingles = sketcher.shingles(array)
        kernels.jaccard(shingles, shingles)
        band_keys([signatures], 0, shape(0.8, 128))
        measured = Measured()
        varied = "\n\n".join(" ".join(f"word{line}{word}" for word in range(12)) for line in range(8))  # no rule drops it early
        for _, rule in rules([Filter(name) for name in RULES]):
            for each in (array, np.frombuffer(varied.encode(), np.uint8)):
                measured.take(each)
                rule(measured)
