"""What a watched swap is judged by."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelm_sdk.counters import Counters, too_bad
from kernelm_sdk.serving import BUCKETS
from kernelm_sdk.system import Bounds

BOUNDS = Bounds(error_rate=0.01, latency_ratio=2.0, latency_ms=20.0, min_calls=20)


def counted(calls: int, failed: int = 0, bucket: int = 5) -> Counters:
    return Counters(calls, failed, (0,) * bucket + (calls,))


def test_a_quantile_is_the_upper_end_of_its_step() -> None:
    counters = Counters(100, 0, (90, 9, 0, 1))
    assert (counters.quantile_ms(0.5), counters.quantile_ms(0.99), counters.quantile_ms(1.0)) == (1 / 16, 2 / 16, 8 / 16)
    assert Counters().quantile_ms(0.99) == 0.0


@given(st.lists(st.integers(0, 1000), max_size=BUCKETS), st.lists(st.integers(0, 1000), max_size=BUCKETS))
def test_differences_and_sums_are_inverse(a: list[int], b: list[int]) -> None:
    one, other = Counters(sum(a), 0, tuple(a)), Counters(sum(b), 0, tuple(b))
    total = one.plus(other)
    difference = total.since(other)
    assert (difference.calls, sum(difference.latency)) == (one.calls, sum(one.latency))
    assert difference.quantile_ms(0.9) == one.quantile_ms(0.9)


def test_an_instance_that_began_anew_never_counts_below_nothing() -> None:
    assert counted(5).since(counted(50)).calls == 0


@pytest.mark.parametrize(("new", "old", "words"), [
    (counted(19, failed=19), counted(100), ""),  # too few to judge
    (counted(100, failed=1), counted(100), ""),
    (counted(100, failed=3), counted(100), "3.0% of 100 calls failed"),
    (counted(100, failed=3), counted(100, failed=3), ""),  # it was no better before
    (counted(100, bucket=8), counted(100, bucket=3), ""),  # 16 ms: fast enough
    (counted(100, bucket=11), counted(100, bucket=3), "p99 is over 64 ms"),
    (counted(100, bucket=11), counted(100, bucket=10), ""),  # within a step of the histogram nobody can tell
    (counted(100, bucket=11), counted(5, bucket=3), ""),  # nothing to compare with
])  # fmt: skip
def test_a_new_pool_is_judged_by_errors_and_by_latency(new: Counters, old: Counters, words: str) -> None:
    verdict = too_bad(new, old, BOUNDS)
    assert bool(verdict) == bool(words), verdict
    assert words in verdict
