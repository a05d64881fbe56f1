"""The load of a deployment, from the counters of its instances."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelm_jobs.load import Gauge
from kernelm_sdk.system import Probe


def probe(answered: int, busy_s: float, in_flight: int = 0, uptime_s: float = 0.0) -> Probe:
    return Probe("i", uptime_s, (), in_flight, answered, 0, 0.0, (0,) * 9 + (answered,), busy_s)


def test_arrivals_rate_and_queue_come_from_the_counters() -> None:
    gauge = Gauge(10.0, 0.0)
    gauge.look({"a": probe(0, 0.0)}, 0.0)
    load = gauge.look({"a": probe(50, 2.5, in_flight=4)}, 5.0)
    assert load.arrivals_per_s == pytest.approx(54 / 5)  # answered, and those that wait now
    assert load.rate_per_s == pytest.approx(20.0)  # 50 calls in 2.5 busy seconds
    assert (load.queue, load.idle_s, load.latency_ms) == (3, 0.0, 32.0)
    idle = gauge.look({"a": probe(54, 2.7)}, 9.0)
    assert idle.queue == 0
    late = gauge.look({"a": probe(54, 2.7)}, 30.0)
    assert (late.arrivals_per_s, late.idle_s) == (0.0, 21.0)
    assert late.rate_per_s == pytest.approx(20.0)  # without calls it is as it was


def test_what_an_instance_did_before_it_was_known_is_no_load() -> None:
    gauge = Gauge(5.0, 100.0)
    first = gauge.look({"old": probe(10_000, 900.0, 4, uptime_s=3600.0)}, 101.0)
    assert (first.arrivals_per_s, first.queue) == (0.0, 3)
    new = gauge.look({"old": probe(10_000, 900.0, 4, uptime_s=3601.0), "new": probe(30, 1.0, uptime_s=0.5)}, 103.0)
    assert new.arrivals_per_s == pytest.approx(30 / 2)


def test_a_caller_that_knocks_again_and_again_is_one_call() -> None:
    gauge = Gauge(5.0, 0.0)
    for at in (10.0, 10.1, 10.3):
        gauge.knock("acme", at)
    load = gauge.look({}, 10.5)
    assert (load.queue, load.idle_s) == (1, pytest.approx(0.2))
    assert gauge.look({}, 20.0).queue == 0


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0, 1), st.integers(0, 50), st.floats(0.1, 3.0)), min_size=1, max_size=40))
def test_whatever_the_counters_say_the_load_makes_sense(steps) -> None:
    gauge, answered, busy_s, now = Gauge(5.0, 0.0), 0, 0.0, 0.0
    for calls, share, in_flight, took in steps:
        now += took
        answered, busy_s = answered + calls, busy_s + share * took
        load = gauge.look({"a": probe(answered, busy_s, in_flight, uptime_s=now)}, now)
        assert min(load.arrivals_per_s, load.rate_per_s, load.idle_s) >= 0.0
        assert load.queue == max(in_flight - 1, 0)
        assert load.calls <= answered
