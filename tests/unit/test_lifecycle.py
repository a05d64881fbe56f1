"""The lifecycle is its table: every other step raises and changes nothing."""

import pytest

from kernelm.lifecycle import LIVE, TRANSITIONS, diagram, step
from kernelm_sdk.errors import ClientFault

STATES = {s for s, _ in TRANSITIONS} | set(TRANSITIONS.values())
HAPPENINGS = {h for _, h in TRANSITIONS}


@pytest.mark.parametrize("state", sorted(STATES))
@pytest.mark.parametrize("happening", sorted(HAPPENINGS))
def test_every_pair(state: str, happening: str) -> None:
    if (state, happening) in TRANSITIONS:
        assert step(state, happening) == TRANSITIONS[state, happening]
    else:
        with pytest.raises(ClientFault, match="can't happen"):
            step(state, happening)


def test_every_state_is_reached_and_every_live_one_can_end() -> None:
    reached, frontier = {""}, {""}
    while frontier:
        frontier = {t for (s, _), t in TRANSITIONS.items() if s in frontier} - reached
        reached |= frontier
    assert reached == STATES
    assert all((state, "exit") in TRANSITIONS for state in LIVE)


def test_the_diagram_shows_every_transition() -> None:
    assert diagram().count("-->") == len(TRANSITIONS)
