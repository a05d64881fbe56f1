"""Imported by the server that worker processes are forked from: everything that they need is loaded, and the compiled kernels are
taken from their cache, once. The collector of reference cycles leaves all that alone from then on, and with it the memory that the
processes share with the server: going over an object writes into it."""

import gc

import resiliparse.extract.html2text
import resiliparse.parse.html

import kernelm_data.corpus.first
import kernelm_data.corpus.second
from kernelm_contracts.data import Clean, Filter
from kernelm_data.corpus import kernels
from kernelm_data.corpus.cleaning import as_steps, cleaner
from kernelm_data.corpus.kernels import np
from kernelm_data.corpus.quality import RULES, Measured, rules
from kernelm_data.corpus.sketches import Sketcher

__all__ = ["kernelm_data", "resiliparse"]


def load_kernels() -> None:
    """Call every compiled function of the first pass once."""
    text = "A line of words, \u00e4\u00e4 and more.\n" * 20
    clean, _ = cleaner(as_steps(Clean()))(text.encode())
    array, sketcher, signature = np.frombuffer(clean, np.uint8), Sketcher(128), np.empty(128, np.uint32)
    sketcher.signature(sketcher.grams(array), signature)
    kernels.shares_any(sketcher.grams(array), np.zeros(16, np.uint64))
    measured = Measured()
    for _, rule in rules([Filter(name) for name in RULES]):
        measured.take(array)
        rule(measured)


load_kernels()
gc.freeze()
