"""Imported by the server that worker processes are forked from: everything that they need is loaded, and the compiled kernels are
taken from their cache, once. The collector of reference cycles does not run meanwhile, and leaves all that alone from then on, and
with it the memory that the processes share with the server: going over an object writes into it."""

import atexit
import gc
import os

gc.disable()

import resiliparse.extract.html2text  # noqa: E402
import resiliparse.parse.html  # noqa: E402

import kernelm_data.corpus.first  # noqa: E402
import kernelm_data.corpus.second  # noqa: E402
from kernelm_data.corpus.compiled import load_kernels  # noqa: E402

__all__ = ["kernelm_data", "resiliparse"]

load_kernels()
gc.freeze()
gc.enable()
atexit.register(os._exit, 0)  # the server holds nothing: taking all of it down, object by object, costs 0.2 s
