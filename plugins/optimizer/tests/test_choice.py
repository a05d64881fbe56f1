import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelm_optimizer.choice import OBJECTIVES, Figures, rank, reason_against

# accuracies of 200 documents and coarse costs, so that ties are common
FIGURES = st.builds(
    Figures, name=st.text("abcdef", min_size=1, max_size=4), accuracy=st.integers(150, 200).map(lambda n: n / 200),
    latency_ms=st.integers(1, 5).map(float), bytes=st.integers(1, 5))
FIELDS = st.lists(FIGURES, min_size=1, max_size=8, unique_by=lambda f: f.name).map(tuple)
DROPS = st.sampled_from([0.0, 0.005, 0.01, 0.1])


@given(FIELDS, st.sampled_from(OBJECTIVES), DROPS, st.randoms())
def test_the_ranking_is_a_permutation_that_ignores_the_order_of_candidates(field, objective, drop, random):
    shuffled = list(field)
    random.shuffle(shuffled)
    ranked = rank(field, objective, drop)
    assert sorted(ranked, key=lambda f: f.name) == sorted(field, key=lambda f: f.name)
    assert rank(tuple(shuffled), objective, drop) == ranked


@given(FIELDS, DROPS)
def test_by_accuracy_nobody_is_better_and_equals_are_dearer(field, drop):
    winner = rank(field, "accuracy", drop)[0]
    assert winner.accuracy == max(f.accuracy for f in field)
    assert winner.latency_ms == min(f.latency_ms for f in field if f.accuracy == winner.accuracy)


@given(FIELDS, DROPS, st.sampled_from(["latency", "size"]))
def test_by_cost_the_winner_is_good_enough_and_no_good_enough_one_is_cheaper(field, drop, objective):
    winner = rank(field, objective, drop)[0]

    def cost(f):
        return f.latency_ms if objective == "latency" else f.bytes

    best = max(f.accuracy for f in field)
    assert winner.accuracy >= best - drop - 1e-9
    # counted in documents, which needs no tolerance
    good_enough = [f for f in field if round(200 * (best - f.accuracy)) <= round(200 * drop)]
    assert cost(winner) == min(cost(f) for f in good_enough)


@given(FIELDS, st.sampled_from(OBJECTIVES), DROPS)
def test_a_candidate_that_is_worse_in_all_respects_changes_nothing(field, objective, drop):
    winner = rank(field, objective, drop)[0]
    worse = Figures("zz", winner.accuracy - 0.2, winner.latency_ms + 1, winner.bytes + 1)
    assert rank((*field, worse), objective, drop)[0] == winner


def test_a_fall_of_exactly_the_limit_is_within_it():
    assert 0.98 - 0.975 > 0.005  # what floating point makes of it
    fast = Figures("fast", 0.975, 1.0, 1)
    assert rank((Figures("best", 0.98, 9.0, 9), fast), "latency", 0.005)[0] == fast
    assert reason_against(fast, Figures("best", 0.98, 9.0, 9), 0.98, "accuracy", 0.005) == ""


def test_an_unknown_objective_is_an_error_and_nothing_ranks_to_nothing():
    with pytest.raises(ValueError, match=r"'beauty' is none of accuracy, latency, size"):
        rank((), "beauty", 0.0)
    assert rank((), "accuracy", 0.0) == ()


WINNER = Figures("w", 0.97, 10.0, 1000)


@pytest.mark.parametrize(("variant", "best", "objective", "reason"), [
    (Figures("v", 0.966, 5.0, 250), 0.97, "accuracy", ""),
    (Figures("v", 0.964, 5.0, 250), 0.97, "accuracy", "accuracy falls by 0.60 points, at most 0.50"),
    (Figures("v", 0.966, 5.0, 250), 0.974, "latency", "accuracy falls by 0.80 points"),  # against the best, not the winner
    (Figures("v", 0.98, 11.0, 250), 0.97, "latency", "no faster: 11.00 ms against 10.00 ms"),
    (Figures("v", 0.98, 5.0, 1000), 0.97, "size", "no smaller: 1000 bytes against 1000"),
    (Figures("v", 0.98, 11.0, 250), 0.97, "size", ""),
    (Figures("v", 0.98, 11.0, 250), 0.97, "accuracy", ""),
    (Figures("v", 0.98, 10.0, 1000), 0.97, "accuracy", "neither faster nor smaller"),
])
def test_int8_is_kept_for_what_it_brings(variant, best, objective, reason):
    found = reason_against(variant, WINNER, best, objective, 0.005)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@given(FIGURES, FIGURES, st.sampled_from(OBJECTIVES), DROPS)
def test_what_is_kept_never_lost_more_than_allowed(variant, winner, objective, drop):
    if not reason_against(variant, winner, winner.accuracy, objective, drop):
        fall = winner.accuracy - variant.accuracy
        assert fall <= drop or math.isclose(fall, drop, abs_tol=1e-9)
        assert variant.latency_ms < winner.latency_ms or variant.bytes < winner.bytes
