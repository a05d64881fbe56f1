"""Whether one classifier is better than another, as pure functions: folds, and tests of a difference on the same documents.

What is imported here is declared as the extra `kernelm-contracts[texts]`.
"""

from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernelm_contracts.trainer import Interval


class Difference(NamedTuple):
    """Of accuracy, the first minus the second, on the same documents."""

    accuracy: float
    interval: Interval  # 95%, by paired bootstrap over the documents
    p: float  # McNemar's exact, two-sided: how likely so unequal a share is between models that are equally good
    first_alone: int  # documents that only the first has right
    second_alone: int

    @property
    def significant(self) -> bool:
        """At 5%."""
        return self.p < 0.05


def stratified_folds(labels: NDArray[np.integer], folds: int, seed: int = 0) -> NDArray[np.int64]:
    """The fold of each document, 0 to folds - 1: of every label each fold gets an equal share, up to one document, and all folds
    are equally large, up to one. ValueError for fewer than two folds or more than there are documents."""
    if not 2 <= folds <= len(labels):
        raise ValueError(f"{folds} folds of {len(labels)} documents")
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
    found = np.empty(len(labels), np.int64)
    found[order] = np.arange(len(labels)) % folds  # going on from label to label keeps the folds equal
    return found


def compare(first: NDArray[np.bool_], second: NDArray[np.bool_], resamples: int = 2000, seed: int = 0) -> Difference:
    """Compare two classifiers by which documents, the same for both, each has right.

    McNemar, "Note on the sampling error of the difference between correlated proportions", 1947, by the exact binomial test.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} documents: it takes the same ones, and at least one")
    gains = first.astype(np.int64) - second
    plus, minus = int((gains > 0).sum()), int((gains < 0).sum())
    tail = sum(comb(plus + minus, k) for k in range(min(plus, minus) + 1)) / 2 ** (plus + minus)
    # a resample is how often each of the three outcomes is drawn
    shares = np.array([plus, minus, len(gains) - plus - minus]) / len(gains)
    counts = np.random.default_rng(seed).multinomial(len(gains), shares, resamples)
    low, high = np.percentile((counts[:, 0] - counts[:, 1]) / len(gains), [2.5, 97.5])
    return Difference(float(gains.mean()), Interval(float(low), float(high)), min(1.0, 2 * tail), plus, minus)
