"""The compiled kernels, taken from Numba's cache in one go, and without what Numba loads beside them but they never use."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module

import numpy as np
from numba.core import entrypoints
from numba.np import linalg

from kernelm_contracts.data import Clean, Filter
from kernelm_data.corpus import kernels
from kernelm_data.corpus.cleaning import as_steps, cleaner
from kernelm_data.corpus.quality import RULES, Measured, rules
from kernelm_data.corpus.sketches import Sketcher, band_keys, shape


@contextmanager
def numba_alone() -> Iterator[None]:
    """Within, Numba sets itself up without SciPy and without the extensions of installed packages (Awkward, which comes with
    Gigatoken): 0.5 of 0.85 s of processor time. Who compiles functions of his own in this process has both afterwards."""

    def without() -> None:
        raise ImportError

    blas, linalg.ensure_blas = linalg.ensure_blas, without
    try:
        import_module("numba.np.arraymath")  # asks for BLAS, once, for the inner product of its own functions
    finally:
        linalg.ensure_blas = blas
    before, entrypoints._already_initialized = entrypoints._already_initialized, True
    try:
        yield
    finally:
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
        kernels.shares_any(sketcher.grams(array), np.zeros(16, np.uint64))
        shingles = sketcher.shingles(array)
        kernels.jaccard(shingles, shingles)
        band_keys([signatures], 0, shape(0.8, 128))
        measured = Measured()
        for _, rule in rules([Filter(name) for name in RULES]):
            measured.take(array)
            rule(measured)
