"""Shadows as pure functions; with a gateway that makes copies they are in test_serving.py."""

from kernelm_contracts.shadows import Compared, Copies, Shadow
from kernelm_jobs.shadows import changed, counted

NOW = Shadow("news", "next", 10, 100.0, copies=Copies(same=3, took_ms=6.0))


def test_another_share_goes_on_and_another_deployment_begins_anew() -> None:
    assert changed(NOW, Shadow("news", "next", 50, 200.0)) == Shadow("news", "next", 50, 100.0, copies=NOW.copies)
    over = changed(NOW, Shadow("news", "next", 0, 200.0))
    assert (over.percent, over.copies) == (0, NOW.copies), "what came of it stays"
    assert changed(over, Shadow("news", "next", 5, 300.0)) == Shadow("news", "next", 5, 300.0), "begun again"
    assert changed(NOW, Shadow("news", "other", 10, 200.0)) == Shadow("news", "other", 10, 200.0)


def test_what_is_told_counts_for_the_shadow_that_it_is_of() -> None:
    told = Compared("news", "next", 100.0, Copies(1, 2, 3, 4, 5.0, 6.0))
    assert counted(NOW, told).copies == Copies(4, 2, 3, 4, 11.0, 6.0)
    assert counted(Shadow("news", "next", 10, 101.0), told).copies == Copies()
    assert counted(Shadow("news", "other", 10, 100.0), told).copies == Copies()
