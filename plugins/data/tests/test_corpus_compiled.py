"""What loading the compiled kernels leaves alone. In processes of their own: what is imported stays imported."""

import subprocess
import sys

ALONE = """
import sys
from kernelm_data.corpus.compiled import load_kernels
load_kernels()
assert not {"scipy.linalg", "awkward"} & sys.modules.keys(), "Numba loaded what the kernels do not use"
"""

WHOLE = """
import json, sys, tempfile
from pathlib import Path
from kernelm_contracts.data import Filter, Input, PrepareRequest
from kernelm_data.corpus.pipeline import Sources, prepare
from kernelm_data.corpus.quality import RULES
folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
words = "the of and that have with be to said went over hill river boat again winter summer north light".split()
begin = [" ".join(words[(7 * n + 3 * k * n + k) % len(words)] for k in range(90)) for n in range(40)]
pages = [f"{text}.\\n\\n\u00e4 Again, and more." for text in begin]
(folder / "in").mkdir()
(folder / "in" / "a.jsonl").write_text("".join(json.dumps({"text": page}) + "\\n" for page in [*pages, pages[3] + " late"]))
inputs, test_sets = (Input(artifact="sha256:a"),), ("sha256:test",)
previous = None
for filters in ((), tuple(Filter(name) for name in RULES)):
    out, against = folder / f"out{len(filters)}", (previous,) if previous else ()
    out.mkdir()
    sets = (("sha256:b",) * len(against), test_sets if previous else ())
    request = PrepareRequest("sha256:a", "auto", filters=filters, against=sets[0], test_sets=sets[1], max_broken=1.0)
    sources = Sources(inputs, (folder / "in",), None, against, against)
    prepare(sources, request, folder / f"work{len(filters)}", out, lambda *_: None)
    previous = out
late = {"numba.np.arraymath", "cffi.cparser", "scipy.linalg", "awkward"} & sys.modules.keys()
sys.exit(f"a kernel was called that had not been loaded, and with it {sorted(late)}" if late else 0)
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


def ended(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def run(code):
    done = ended(code)
    assert done.returncode == 0, done.stderr


def test_kernels_load_neither_scipy_nor_the_extensions_of_numba():
    run(ALONE)


def test_functions_of_others_find_the_extensions_of_numba_afterwards():
    run(LATER)


def test_no_kernel_is_loaded_late_and_with_all_of_numba(tmp_path):
    ended(WHOLE, str(tmp_path))  # compiles what is not in the cache yet
    done = ended(WHOLE, str(tmp_path))
    assert done.returncode == 0, done.stderr
