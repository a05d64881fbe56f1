import numpy as np
import pytest

from kernelm_contracts.comparison import compare, stratified_folds


def test_folds_have_every_label_in_equal_shares() -> None:
    labels = np.repeat([0, 1, 2], [50, 33, 14])
    folds = stratified_folds(labels, 5, seed=1)
    sizes = np.bincount(folds)
    assert sizes.max() - sizes.min() <= 1
    for label in range(3):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(folds, stratified_folds(labels, 5, seed=1))
    assert not np.array_equal(folds, stratified_folds(labels, 5, seed=2))


@pytest.mark.parametrize("folds", [1, 4])
def test_folds_that_cannot_be_are_refused(folds: int) -> None:
    with pytest.raises(ValueError, match=f"{folds} folds of 3"):
        stratified_folds(np.zeros(3, int), folds)


def test_a_known_comparison() -> None:
    first = np.array([True] * 90 + [False] * 10)
    second = np.array([True] * 80 + [False] * 10 + [True] * 2 + [False] * 8)
    found = compare(first, second)
    assert (found.first_alone, found.second_alone) == (10, 2)
    assert found.accuracy == pytest.approx(0.08)
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)  # both tails of the binomial distribution of 12
    assert found.significant
    assert 0.0 < found.interval.low < 0.08 < found.interval.high < 0.2


def test_equal_models_do_not_differ() -> None:
    right = np.array([True, False, True])
    assert compare(right, right).p == 1.0
    assert not compare(right, ~right).significant
    with pytest.raises(ValueError, match="2 and 3 documents"):
        compare(right[:2], right)


def test_models_that_are_equally_good_seldom_differ() -> None:
    """At 5%, an exact test is wrong in at most 5% of the cases."""
    random = np.random.default_rng(0)
    wrong = sum(compare(random.random(200) < 0.8, random.random(200) < 0.8, resamples=1).significant for _ in range(400))
    assert wrong <= 0.08 * 400
