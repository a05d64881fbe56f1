"""Interpolated modified Kneser-Ney n-grams (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling",
1998, section 4; the estimator of KenLM's lmplz), over a stream of token ids.

An n-gram is known by a number: its place among those that occur, sorted by (number of its first n-1 tokens, last token).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
FALLBACK = (0.5, 1.0, 1.5)  # discounts where a count from 1 to 4 never occurs (lmplz --discount_fallback)
ABSENT = -1


class Order(NamedTuple):
    """The n-grams of one length, and what follows the contexts that are one shorter."""

    keys: Ids  # [n-grams], number of the context x vocabulary + last token, sorted
    discounted: Floats  # [n-grams], count less its discount
    totals: Floats  # [contexts], counts of all n-grams of the context
    held_back: Floats  # [contexts], the discounts of them all


class KneserNey:
    """Estimated on the stream `ids` of tokens 0 to `vocabulary` - 1."""

    def __init__(self, ids: Ids, vocabulary: int, order: int = 5) -> None:
        self.vocabulary = vocabulary
        keys: list[Ids] = []
        numbered: list[Ids] = []  # of each order, for each place in the stream: the number of the n-gram that ends there
        firsts: list[Ids] = []  # where each n-gram occurs first
        contexts = np.zeros(len(ids), np.int64)  # there is one empty context
        for _ in range(order):
            found, first, numbers = np.unique(contexts * vocabulary + ids[-len(contexts) :], return_index=True, return_inverse=True)
            keys.append(found)
            firsts.append(first)
            numbered.append(numbers)
            contexts = numbers[:-1]
        counts = np.bincount(numbered[-1]).astype(np.float64)
        self.orders: list[Order] = []
        for n in reversed(range(order)):
            contexts = keys[n] // vocabulary
            size = len(keys[n - 1]) if n else 1
            discounts = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3).astype(np.int64)]
            self.orders.insert(0, Order(keys[n], counts - discounts, np.bincount(contexts, counts, size),
                                        np.bincount(contexts, discounts, size)))  # fmt: skip
            if n:  # a shorter n-gram counts as often as there are different tokens before it
                shorter = numbered[n - 1][firsts[n] + 1]
                counts = np.maximum(np.bincount(shorter, minlength=size), 1).astype(np.float64)

    def probabilities(self, ids: Ids) -> Floats:
        """Of each token of a stream, after those before it in the stream."""
        found = np.full(len(ids), 1.0 / self.vocabulary)
        contexts = np.zeros(len(ids), np.int64)  # number of the context of each token, by order
        for order in self.orders:
            seen = contexts != ABSENT
            total = np.where(seen, order.totals[contexts], 0.0)
            seen &= total > 0
            keys = contexts * self.vocabulary + ids
            places = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            hit = seen & (order.keys[places] == keys)
            own = np.where(hit, order.discounted[places], 0.0)
            found = np.where(seen, (own + order.held_back[contexts] * found) / np.where(seen, total, 1.0), found)
            numbers = np.where(hit, places, ABSENT)  # an n-gram that does not occur has no longer one either
            contexts = np.concatenate([[ABSENT], numbers[:-1]])
        return found


def _discounts(counts: Floats) -> tuple[float, ...]:
    """What is taken off a count of 1, of 2, and of 3 or more (equation 26)."""
    n1, n2, n3, n4 = (float((counts == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    return 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
