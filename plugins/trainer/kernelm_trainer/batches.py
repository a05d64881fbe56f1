"""Batches of documents of similar length, in an order that follows from seed and epoch alone."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

BUCKET = 50  # batches that are sorted by length together


def shuffled(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Batches of up to `size` indices into `lengths`: each index once, neighbours in length together, batches mixed."""
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), BUCKET * size):
        bucket = order[start : start + BUCKET * size]
        bucket = bucket[np.argsort([lengths[i] for i in bucket], kind="stable")]
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return [batches[i] for i in random.permutation(len(batches))]


def longest_first(lengths: Sequence[int], size: int) -> list[NDArray[np.int64]]:
    """Batches for inference. The longest come first, so that too little memory shows at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def padded(rows: Sequence[NDArray[np.int64]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, both [batch, longest] int64."""
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row)
        mask[i, : len(row)] = 1
    return ids, mask


def poisson(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """As many batches, of rows that are each drawn with the same probability, `size` on average; some may be empty. What is known
    of differential privacy rests on this way of drawing (Mironov et al., "Renyi DP of the sampled Gaussian mechanism", 2019)."""
    random = np.random.default_rng((seed, epoch))
    return [np.flatnonzero(random.random(len(lengths)) < size / len(lengths)) for _ in range(-(-len(lengths) // size))]
