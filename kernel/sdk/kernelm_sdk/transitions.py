"""A table of states, (state, what happens) -> next state: what is not in it can't happen."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from kernelm_sdk.errors import ClientFault

S = TypeVar("S", bound=str)


def step(table: Mapping[tuple[str, str], S], state: str, happening: str, whose: str) -> S:
    """The next state; ClientFault "illegal_transition" that names `whose` state it is, where the table has none."""
    try:
        return table[state, happening]
    except KeyError:
        legal = sorted(h for s, h in table if s == state)
        raise ClientFault("illegal_transition", f"{happening!r} can't happen to {whose}",
                          f"possible: {', '.join(legal) or 'nothing'}") from None  # fmt: skip


def diagram(table: Mapping[tuple[str, str], str], final: Iterable[str] = ()) -> str:
    """The table as a Mermaid state diagram, with an end behind each `final` state."""
    lines = [f"    {s or '[*]'} --> {t}: {h}" for (s, h), t in table.items()]
    return "\n".join(["stateDiagram-v2", *lines, *(f"    {s} --> [*]" for s in sorted(final))])
