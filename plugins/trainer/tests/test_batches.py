import numpy as np

from kernelm_trainer.batches import longest_first, padded, shuffled


def test_batches_hold_every_document_once_and_follow_from_the_seed() -> None:
    lengths = list(np.random.default_rng(0).integers(1, 256, 1003))
    batches = shuffled(lengths, 16, seed=3, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert all((a == b).all() for a, b in zip(batches, shuffled(lengths, 16, seed=3, epoch=0), strict=True))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(shuffled(lengths, 16, seed=3, epoch=1)))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(shuffled(lengths, 16, seed=4, epoch=0)))


def test_buckets_save_padding() -> None:
    lengths = list(np.random.default_rng(0).integers(1, 256, 1600))

    def computed(batches: list[np.ndarray]) -> int:
        return sum(len(b) * max(lengths[i] for i in b) for b in batches)

    unsorted = np.split(np.random.default_rng(0).permutation(1600), 100)
    assert computed(shuffled(lengths, 16, 0, 0)) < 0.6 * computed(unsorted)


def test_padding_and_order_of_inference() -> None:
    rows = [np.array([7]), np.array([5, 6, 7])]
    ids, mask = padded(rows, pad=9)
    assert ids.tolist() == [[7, 9, 9], [5, 6, 7]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert [b.tolist() for b in longest_first([1, 3, 2], 2)] == [[1, 2], [0]]
