"""What loading the compiled kernels leaves alone. In processes of their own: what is imported stays imported."""

import subprocess
import sys

ALONE = """
import sys
from kernelm_data.corpus.compiled import load_kernels
load_kernels()
assert not {"scipy.linalg", "awkward"} & sys.modules.keys(), "Numba loaded what the kernels do not use"
"""

LATER = """
import numba.core.entrypoints
loaded = []
class Points(list):
    def select(self, **_):
        return self
class Point:
    module = "extension"
    def load(self):
        return lambda: loaded.append(1)
numba.core.entrypoints.importlib_metadata.entry_points = lambda: Points([Point()])
from kernelm_data.corpus.compiled import load_kernels
load_kernels()
assert not loaded
numba.njit(lambda: 1)()
assert loaded, "functions of others have to find their extensions"
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_load_neither_scipy_nor_the_extensions_of_numba():
    run(ALONE)


def test_functions_of_others_find_the_extensions_of_numba_afterwards():
    run(LATER)
